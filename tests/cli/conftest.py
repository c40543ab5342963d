"""What several tests of the command line share."""

from __future__ import annotations

import pytest
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def ears(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Whisper, its tokenizer of letters and its feature extractor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("ears")
    vocabulary = {c: n for n, c in enumerate(["<|endoftext|>", "<s>", "Ġ", *LETTERS])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=8, d_model=64, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=1500, max_target_positions=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=0, decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.requires_grad and weight.dim() == 2:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
        # Nearly even chances for every token, so that any transcript fits.
        model.model.decoder.embed_tokens.weight.mul_(0.05)
    model.generation_config.max_length = 12
    model.save_pretrained(folder)
    return str(folder)
