/* Unpacks the data, draws the text page by page, and the figures as they come into view. */
(async function () {
  "use strict";
  const $ = (id) => document.getElementById(id);
  const PAGE = 1000;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const fail = (words) => { $("notice").textContent = words; $("notice").hidden = false; };
  if (typeof DecompressionStream === "undefined") {
    return fail("This browser is too old to unpack the figures: open the page in one from 2023 or later.");
  }
  async function unpack(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  const make = (tag, text, cls) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const number = (v) => {
    if (v === null || v === undefined) return "–";
    const size = Math.abs(v);
    if (v !== 0 && (size < 1e-3 || size >= 1e7)) {
      const raised = (n) => n.replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
      const [digits, power] = v.toExponential(1).split("e");
      return digits + " × 10" + raised(power.replace("+", ""));
    }
    return v.toLocaleString("en", { maximumSignificantDigits: 3 });
  };
  const shown = (t) => t.replace(/\r\n|\r|\n/g, "↵").replace(/\t/g, "⇥").trim() || (t ? "␣" : "·");

  let data;
  try { data = JSON.parse(await unpack("data")); }
  catch (error) { return fail("The data of this page are damaged: " + error.message); }
  const { tokens, views, marks, rows = [] } = data;

  /* ---- the text ---- */
  if (tokens.length && views.length && $("reader")) startReader();

  function startReader() {
    const words = $("words"), strip = $("strip"), tip = $("tip");
    const sets = Object.fromEntries(Object.entries(marks).map(([k, v]) => [k, new Set(v)]));
    const pages = Math.ceil(tokens.length / PAGE);
    const wide = pages > 1;
    let view = views[0], page = 0, current = -1, spans = [];
    $("reader").hidden = false;
    words.classList.toggle("few", tokens.length < 350);

    const levelOf = (value) => {
      if (value === null) return 0;
      let level = 0;
      while (level < view.edges.length && value >= view.edges[level]) level++;
      return level;
    };

    views.forEach((v, i) => {
      const label = make("label", undefined, "choice");
      const input = make("input");
      input.type = "radio"; input.name = "view"; input.checked = i === 0;
      input.addEventListener("change", () => { view = v; paint(); });
      label.append(input, make("span", v.label));
      $("views").append(label);
    });

    /* A view of what one token looks at, for short texts. */
    const chosen = rows.length ? make("label", undefined, "choice") : null;
    if (chosen) {
      const input = make("input");
      input.type = "radio"; input.name = "view";
      chosen.append(input, make("span"));
      chosen.hidden = true;
      $("views").append(chosen);
    }
    function rowOf(i) {
      const values = tokens.map((_, k) => rows[i][k] ?? null);
      const known = values.filter((v) => v > 0).sort((a, b) => a - b);
      const count = Math.max(...views.map((v) => v.edges.length));
      const high = known[Math.max(0, known.length - 2)] || 1, low = Math.max(known[0] || 0, high / 100);
      const edges = high > low
        ? Array.from({ length: count }, (_, k) => low * Math.pow(high / low, (k + 1) / (count + 1))) : [];
      const top = values.map((_, k) => k).filter((k) => values[k] > 0)
        .sort((a, b) => values[b] - values[a]).slice(0, 12);
      return { label: `what “${shown(tokens[i])}” looks at`, unit: "share", scale: "log", values, edges, top,
        help: `exact attention of token ${i} on each key, mean over layers and heads` };
    }
    function lookFrom(i) {
      if (!chosen || !rows[i]) return;
      view = rowOf(i);
      const [input, label] = chosen.children;
      label.textContent = view.label;
      input.checked = true; chosen.hidden = false;
      input.onchange = () => { view = rowOf(i); paint(); };
      paint();
    }

    if (Object.keys(sets).length) {
      const label = make("label");
      const box = make("input");
      box.type = "checkbox"; box.checked = true;
      words.classList.add("marked");
      box.addEventListener("change", () => words.classList.toggle("marked", box.checked));
      label.append(box, " show marks:");
      $("mark-switch").append(label);
      for (const name of Object.keys(sets)) $("mark-switch").append(make("span", undefined, "key " + name), name + "  ");
    }

    function drawPage() {
      const start = page * PAGE, end = Math.min(start + PAGE, tokens.length);
      const all = document.createDocumentFragment();
      spans = [];
      for (let i = start; i < end; i++) {
        const span = make("span");
        span.dataset.i = i;
        const text = tokens[i];
        if (text === "") span.append(make("span", "·", "nl"));
        else if (/[\r\n]/.test(text)) {
          text.split(/(\r\n|\r|\n)/).forEach((part) => {
            if (/[\r\n]/.test(part)) span.append(make("span", "↵", "nl"), "\n");
            else if (part) span.append(part);
          });
        } else span.textContent = text;
        spans.push(span);
        all.append(span);
      }
      words.replaceChildren(all);
      words.scrollTop = 0;
      $("where").textContent = wide
        ? `Tokens ${(start + 1).toLocaleString("en")}–${end.toLocaleString("en")} of ${tokens.length.toLocaleString("en")}`
        : `${tokens.length.toLocaleString("en")} tokens`;
      $("back").disabled = page === 0; $("next").disabled = page === pages - 1;
      $("back").hidden = $("next").hidden = !wide;
      colorPage();
    }
    function colorPage() {
      const start = page * PAGE;
      spans.forEach((span, k) => {
        const i = start + k, level = levelOf(view.values[i]);
        let cls = level ? "l" + level : "";
        for (const name in sets) if (sets[name].has(i)) cls += " " + name;
        span.className = cls + (i === current ? " on" : "");
      });
    }
    function paint() {
      $("view-help").textContent = view.help;
      const unit = view.unit ? " " + view.unit : "";
      const ends = view.edges.length ? [view.edges[0], view.edges[view.edges.length - 1]] : null;
      $("scale").replaceChildren(...(ends
        ? [make("span", "below " + number(ends[0])), make("i", undefined, "ramp"),
          make("span", number(ends[1]) + unit + " or more" + (view.scale === "log" ? " (logarithmic)" : ""))]
        : [make("span", "the same value everywhere")]));
      const top = [make("span", "Highest:")];
      for (const i of view.top) {
        const button = make("button", shown(tokens[i]));
        button.type = "button";
        button.title = `token ${i}: ${number(view.values[i])}${unit}`;
        button.addEventListener("click", () => go(i, true));
        top.push(button);
      }
      $("top").replaceChildren(...top);
      colorPage(); drawStrip();
    }

    /* The strip: the strongest level of every few tokens, as tall as it is strong. */
    function drawStrip() {
      const ratio = devicePixelRatio || 1, width = strip.clientWidth, height = strip.clientHeight;
      if (!width) return;
      strip.width = width * ratio; strip.height = height * ratio;
      const pen = strip.getContext("2d"), style = getComputedStyle(document.documentElement);
      const color = (name) => style.getPropertyValue("--" + name).trim();
      pen.scale(ratio, ratio);
      pen.fillStyle = color("s0"); pen.fillRect(0, 0, width, height);
      const bars = Math.min(Math.floor(width / 2), tokens.length);
      const tops = view.edges.length + 1;
      for (let b = 0; b < bars; b++) {
        const from = Math.floor(b * tokens.length / bars), to = Math.floor((b + 1) * tokens.length / bars);
        let best = 0;
        for (let i = from; i < to; i++) best = Math.max(best, levelOf(view.values[i]));
        if (!best) continue;
        pen.fillStyle = color("s" + best);
        const tall = (best + 1) / tops * (height - 4);
        pen.fillRect(b * width / bars, height - tall, Math.max(width / bars - 0.3, 0.7), tall);
      }
      if (wide) {
        pen.strokeStyle = color("preplan"); pen.lineWidth = 2;
        const left = page * PAGE / tokens.length * width;
        const right = Math.min((page + 1) * PAGE, tokens.length) / tokens.length * width;
        pen.strokeRect(left + 1, 1, Math.max(right - left - 2, 2), height - 2);
      }
      strip.setAttribute("aria-valuemax", tokens.length - 1);
      strip.setAttribute("aria-valuenow", Math.max(current, page * PAGE));
      strip.setAttribute("aria-valuetext", `tokens ${page * PAGE + 1} to ${Math.min((page + 1) * PAGE, tokens.length)}`);
    }

    function turn(to) {
      const wanted = Math.min(Math.max(to, 0), pages - 1);
      if (wanted === page) return;
      page = wanted; hide(); drawPage(); drawStrip();
    }
    function go(i, say) {
      if (i < 0 || i >= tokens.length) return;
      turn(Math.floor(i / PAGE));
      const old = current; current = i;
      for (const k of [old, i]) {
        const span = spans[k - page * PAGE];
        if (span) span.classList.toggle("on", k === i);
      }
      const span = spans[i - page * PAGE], box = words.getBoundingClientRect(), at = span.getBoundingClientRect();
      if (at.top < box.top + 8 || at.bottom > box.bottom - 8) words.scrollTop += at.top - box.top - box.height / 3;
      if (words.getBoundingClientRect().top < 0 || words.getBoundingClientRect().top > innerHeight * 0.8) words.scrollIntoView({ block: "center" });
      tell(i, span);
      if (say) $("spoken").textContent = `Token ${i}, ${shown(tokens[i])}: ` +
        views.map((v) => `${v.label} ${number(v.values[i])} ${v.unit}`).join(", ");
    }
    function tell(i, span) {
      const list = make("dl");
      list.append(make("dt", "position"), make("dd", i.toLocaleString("en")));
      for (const v of views) {
        const mark = v === view ? "now" : undefined;
        list.append(make("dt", v.label, mark), make("dd", `${number(v.values[i])} ${v.values[i] === null ? "" : v.unit}`, mark));
      }
      for (const name in sets) if (sets[name].has(i)) list.append(make("dt", "marked"), make("dd", name));
      tip.replaceChildren(make("b", shown(tokens[i])), list);
      tip.hidden = false;
      const at = span.getClientRects()[0] || span.getBoundingClientRect();
      const x = Math.min(Math.max(at.left, 8), innerWidth - tip.offsetWidth - 8);
      const below = at.bottom + 8 + tip.offsetHeight < innerHeight;
      tip.style.left = x + "px";
      tip.style.top = (below ? at.bottom + 6 : Math.max(at.top - tip.offsetHeight - 6, 4)) + "px";
    }
    function hide() { tip.hidden = true; }

    const hit = (event) => event.target.closest && event.target.closest("span[data-i]");
    words.addEventListener("pointerover", (event) => { const s = hit(event); if (s) tell(+s.dataset.i, s); });
    words.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    words.addEventListener("click", (event) => { const s = hit(event); if (s) { lookFrom(+s.dataset.i); go(+s.dataset.i, false); } else hide(); });
    words.addEventListener("scroll", hide, { passive: true });
    words.addEventListener("blur", hide);
    addEventListener("scroll", hide, { passive: true });
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, PageDown: PAGE, PageUp: -PAGE };
    function key(event) {
      if (event.key === "Escape") return hide();
      if (event.key === "Enter" && current >= 0) return lookFrom(current);
      let to = null;
      if (event.key in step) to = (current < 0 ? page * PAGE - Math.sign(step[event.key]) : current) + step[event.key];
      else if (event.key === "Home") to = 0;
      else if (event.key === "End") to = tokens.length - 1;
      if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      // A programmatic scroll fires "scroll" later, which would hide the words just shown.
      go(Math.min(Math.max(to, 0), tokens.length - 1), true);
      const i = current;
      requestAnimationFrame(() => requestAnimationFrame(() => { if (current === i) tell(i, spans[i - page * PAGE]); }));
    }
    words.addEventListener("keydown", key);
    strip.addEventListener("keydown", key);
    strip.addEventListener("click", (event) => {
      const share = (event.clientX - strip.getBoundingClientRect().left) / strip.clientWidth;
      go(Math.min(Math.floor(share * tokens.length), tokens.length - 1), true);
    });
    $("back").addEventListener("click", () => turn(page - 1));
    $("next").addEventListener("click", () => turn(page + 1));
    new ResizeObserver(drawStrip).observe(strip);
    dark.addEventListener("change", drawStrip);
    drawPage(); paint();
  }

  /* ---- the figures ---- */
  const slots = [...document.querySelectorAll("[data-figure]")];
  if (!slots.length || !$("plotly")) return;
  const code = make("script", await unpack("plotly"));
  document.head.append(code);
  const Plotly = window.Plotly;
  if (!Plotly) return fail("The figures could not be unpacked in this browser.");

  /* Figures are stored in the light inks; the dark ones are swapped in by value. */
  function inked(value, isDark) {
    if (typeof value === "string") return isDark && data.inks[value] || value;
    if (Array.isArray(value)) { // long lists of numbers and words hold no inks
      const plain = value.length > 24 && typeof value[0] !== "object";
      return plain ? value : value.map((v) => inked(v, isDark));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, inked(v, isDark)]));
    }
    return value;
  }
  function draw(slot, isDark = dark.matches) {
    const figure = data.figures[slot.dataset.figure];
    const layout = { ...inked(figure.layout, isDark), template: data.themes[isDark ? "dark" : "light"] };
    const old = slot.layout && slot.layout.xaxis && slot.layout.xaxis.range;
    if (slot.dataset.figure === "rhythm" && old) layout.xaxis.range = [...old];
    if (slot.clientWidth < 480 && layout.margin) layout.margin = { ...layout.margin, r: 4 };
    const first = !slot.dataset.drawn, small = slot.dataset.figure.startsWith("thumb");
    const traces = inked(figure.data, isDark);
    if (small) traces.forEach((t) => { t.hoverinfo = "none"; delete t.hovertemplate; });
    slot.dataset.drawn = "yes";
    const done = Plotly.react(slot, traces, layout,
      { displayModeBar: false, responsive: true, displaylogo: false, doubleClick: false });
    if (first && small) done.then(() => {
      /* Plotly would clip its label at the edge of so small a figure. */
      const tip = $("tip");
      slot.on("plotly_hover", ({ event, points: [p] }) => {
        const share = p.customdata === undefined || p.customdata === null ? p.z : p.customdata;
        if (share === null || share === undefined) { tip.hidden = true; return; }
        tip.replaceChildren(`Tokens ${p.y} give tokens ${p.x} ${number(100 * share)} % of their attention`);
        tip.hidden = false;
        tip.style.left = Math.max(Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8), 8) + "px";
        tip.style.top = Math.max(Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8), 8) + "px";
      });
      slot.on("plotly_unhover", () => { tip.hidden = true; });
    });
    return done;
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  slots.forEach((slot) => watcher.observe(slot));
  const again = (isDark) => slots.forEach((slot) => { if (slot.dataset.drawn) draw(slot, isDark); });
  dark.addEventListener("change", () => again(dark.matches));
  addEventListener("beforeprint", () => slots.forEach((slot) => draw(slot, false)));
  addEventListener("afterprint", () => again(dark.matches));
})();
