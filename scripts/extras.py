"""Try regard in clean environments: one without extras, and one for each of them.

Each extra has a command that needs it. Without extras it must end with one message that names the
extra, exit code 2 or an ImportError; with the extra it must run. An environment holds torch and
takes some GB, so it is removed before the next one is made.

    python scripts/extras.py                 all of them
    python scripts/extras.py bare report     only these
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
SOUND = (
    "import wave; f = wave.open('tone.wav', 'wb'); f.setparams((1, 2, 8000, 0, 'NONE', '')); "
    "f.writeframes(bytes(range(256)) * 60); f.close(); "
)
SEEN = (
    "import torch, regard; model = regard.zoo.tiny('llama')\n"
    "with regard.watch(model) as seen: model(torch.arange(9)[None])\n"
    "seen.report('page.html')"
)
USES: dict[str, list[str]] = {
    "report": ["-c", SEEN],
    "gguf": [
        "-c",
        "from pathlib import Path; from regard.zoo import convert\n"
        "try: convert._from_gguf(Path('.'), 'none.gguf', Path('out'))\n"
        "except OSError: pass",
    ],
    "bench": ["-c", "from regard.lab.bench import see; see._needs_psutil()"],
    "speech": ["-c", SOUND + "from regard.zoo import audio; audio.read('tone.wav', rate=16000)"],
    "steer": [
        *("-m", "regard", "run", "var", "--image", "photo.png", "--prompt", "is it red?"),
        *("--model", "shapes-vlm", "-n", "2"),
    ],
    "explain": [
        "-c",
        "import torch; from regard.see.cross_attention_explanation import saliency\n"
        "saliency.superpixels(torch.rand(64, 64), 4)",
    ],
    "diffusion": ["-m", "regard", "see", "a red circle", "--model", "shapes-sd", "--steps", "1"],
    "data": ["-c", "from regard.see.stable_semantics.rows import features; features()"],
    "ray": ["-c", "from regard.see.stable_semantics.build import need_ray; need_ray()"],
    "video": [
        "-c",
        "from pathlib import Path; from regard.zoo import frames\n"
        "try: frames._decoded(Path('none.mp4'), 1)\n"
        "except (OSError, ValueError): pass",
    ],
    "rl": ["-c", "from regard.see.preplan_anchor import grpo; grpo.trainer_class()"],
    "lm-eval": ["-c", "from regard.lab.trials import lm_eval; lm_eval.available()"],
}
"""What is run in the environment of an extra, and in the bare one."""
MAKE_PICTURE = (  # a red square, without pillow
    "import struct, zlib; "
    "part = lambda n, d: struct.pack('>I', len(d)) + n + d + struct.pack('>I', zlib.crc32(n + d)); "
    "rows = b''.join(b'\\0' + b'\\xff\\0\\0' * 64 for _ in range(64)); "
    "open('photo.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' "
    "+ part(b'IHDR', struct.pack('>IIBBBBB', 64, 64, 8, 2, 0, 0, 0)) "
    "+ part(b'IDAT', zlib.compress(rows)) + part(b'IEND', b''))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"bare, {', '.join(USES)}; all when left out")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, not removed")
    given = parser.parse_args()
    names = given.names or ["bare", *USES]
    unknown = set(names) - {"bare", *USES}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    wrong = []
    with tempfile.TemporaryDirectory(prefix="regard-extras-") as scratch:
        wheel = build(Path(scratch))
        for name in names:
            folder = (given.keep or Path(scratch)) / f"venv-{name}"
            python = environment(folder, wheel, "" if name == "bare" else name)
            work = Path(tempfile.mkdtemp(dir=scratch))
            call(python, ["-c", MAKE_PICTURE], work)
            wrong += bare(python, work) if name == "bare" else extra(python, work, name)
            if given.keep is None:
                shutil.rmtree(folder)
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


def build(scratch: Path) -> Path:
    """The wheel of this checkout."""
    pip(sys.executable, "wheel", "--no-deps", "-w", str(scratch), str(ROOT))
    return next(scratch.glob("regard-*.whl"))


def environment(folder: Path, wheel: Path, extra: str) -> str:
    """The Python of a fresh environment with the wheel and the extra; torch first, it is by far the
    largest part.
    """
    print(f"{folder.name} ...", flush=True)
    python = str(folder / "bin" / "python")
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(python, "install", "-c", str(ROOT / "constraints.txt"), TORCH)
    what = f"regard[{extra}]" if extra else "regard"
    pip(python, "install", "-c", str(ROOT / "constraints.txt"), f"{what} @ {wheel.as_uri()}")
    return python


def pip(python: str, *words: str) -> None:
    quiet = ["-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([python, *quiet, *words], check=True)


def call(python: str, words: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    alone = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [python, *words], cwd=work, env={**alone, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def bare(python: str, work: Path) -> list[str]:
    """Without extras: the plain commands run, and each command that needs one names it."""
    wrong = []
    plain = (
        ["-m", "regard", "methods"],
        ["-m", "regard", "models"],
        ["-m", "regard", "bench", "plan", "--ranks", "8", "--tokens", "1M"],
        ["-c", SEEN.replace("seen.report('page.html')", "seen['entropy']")],
    )
    for words in plain:
        done = call(python, words, work)
        if done.returncode:
            wrong.append(f"bare: {' '.join(words)[:60]} failed: {done.stderr.strip()[-300:]}")
    for name, words in USES.items():
        done = call(python, words, work)
        said = done.stderr.strip().splitlines()[-1:] or [""]
        good = f"regard[{name}]" in said[0] and ("regard" in words[:2]) <= (done.returncode == 2)
        if not done.returncode or not good:
            wrong.append(f"bare: {name} is not named (exit {done.returncode}): {said[0][:300]}")
        else:
            print(f"  {name}: {said[0][:100]}", flush=True)
    return wrong


def extra(python: str, work: Path, name: str) -> list[str]:
    """With one extra: its command runs."""
    done = call(python, USES[name], work)
    if done.returncode:
        return [f"{name}: exit {done.returncode}: {done.stderr.strip()[-500:]}"]
    print(f"  {name}: runs", flush=True)
    return []


if __name__ == "__main__":
    sys.exit(main())
