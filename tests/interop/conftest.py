"""Small but real checkpoints of every family, made offline: SentencePiece models, tokenizers, random models."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import processors

WORDS = """the a house tree dog cat runs sees big small red blue over under river stone bread water sun moon
ein eine Haus Baum Hund Katze läuft sieht groß klein rot blau über unter Fluss Stein Brot Wasser Sonne Mond
nyumba mti mbwa paka anakimbia anaona kubwa ndogo mto jiwe mkate maji jua mwezi""".split()
FAMILIES = ("m2m100", "nllb", "mbart50", "marian", "t5")
T5 = ("t5", "t5-tied", "mt5", "umt5", "byt5", "madlad")


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


def train_pieces(path: Path, **options) -> Path:
    model = io.BytesIO()
    options = {"model_type": "unigram", "vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)), model_writer=model, num_threads=1, **options
    )
    path.write_bytes(model.getvalue())
    return path


def pieces_of(path: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def make_tokenizer(family: str, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    if family == "m2m100":
        model = train_pieces(folder / "sentencepiece.bpe.model")
        words = ["<s>", "<pad>", "</s>", "<unk>", *pieces_of(model)[3:]]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        return transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(model))
    if family in ("nllb", "nllb-moe", "seamless"):
        pieces = pieces_of(train_pieces(folder / "pieces.model", model_type="bpe"))
        marks = ["<pad>", "<unk>", "<s>", "</s>"] if family == "seamless" else ["<s>", "<pad>", "</s>", "<unk>"]
        vocabulary = {word: i for i, word in enumerate([*marks, *pieces[3:]])}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in pieces
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
        if family == "seamless":
            languages = ["__eng__", "__deu__", "__swh__", "__cmn__", "__cmn_Hant__", "__fra__"]
            return transformers.SeamlessM4TTokenizer(
                vocab=vocabulary, merges=merges, additional_special_tokens=languages
            )
        return transformers.NllbTokenizer(vocab=vocabulary, merges=merges)
    if family in ("mbart50", "mbart25"):
        train_pieces(folder / "sentencepiece.bpe.model")
        name = "MBart50Tokenizer" if family == "mbart50" else "MBartTokenizer"
        return getattr(transformers, name).from_pretrained(folder)
    if family == "marian-separate":
        source = train_pieces(folder / "source.spm")
        target = train_pieces(folder / "target.spm", model_type="bpe", vocab_size=60)
        for name, model in (("vocab.json", source), ("target_vocab.json", target)):
            words = ["</s>", "<unk>", *pieces_of(model)[3:], "<pad>"]
            (folder / name).write_text(json.dumps({word: i for i, word in enumerate(words)}))
        files = (folder / "vocab.json", folder / "target_vocab.json")
        return transformers.MarianTokenizer(str(source), str(target), *map(str, files), separate_vocabs=True)
    if family in ("marian", "marian-many"):
        source = train_pieces(folder / "source.spm")
        target = train_pieces(folder / "target.spm", model_type="bpe")
        tags = [">>deu<<", ">>cmn_Hans<<", ">>swh<<"] if family == "marian-many" else []
        words = ["</s>", "<unk>", *tags, *sorted({*pieces_of(source)[3:], *pieces_of(target)[3:]}), "<pad>"]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        return transformers.MarianTokenizer(str(source), str(target), str(folder / "vocab.json"))
    if family == "byt5":
        return transformers.ByT5Tokenizer()
    if family == "t5gemma":
        pieces = pieces_of(train_pieces(folder / "pieces.model", model_type="bpe"))[3:]
        marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "en_US", "zh_CN"]  # two pieces of words, as Gemma has
        vocabulary = {word: i for i, word in enumerate([*marks, *pieces])}
        cuts = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
        merges = [pair for pair in cuts if vocabulary.keys() >= set(pair)]
        tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=merges)
        tokenizer.add_tokens(["<start_of_turn>", "<unused0>"], special_tokens=True)
        begin = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
        tokenizer.backend_tokenizer.post_processor = begin
        return tokenizer
    tags = ["<2en>", "<2sw>", "<2de>"] if family == "madlad" else []
    train_pieces(
        folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=tags, vocab_size=95
    )
    return transformers.T5Tokenizer.from_pretrained(folder)


def make_model(family: str, vocab_size: int, layers: int = 1, seed: int = 0):
    """A random model of the family: d = 16, ffn = 24, 2 heads. The shapes of the parts all differ."""
    torch.manual_seed(seed)
    bart = {
        "vocab_size": vocab_size,
        "d_model": 16,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.3,
    }
    if family in ("m2m100", "nllb"):
        model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**bart))
    elif family == "nllb-moe":  # the second layer of a side has experts
        routed = {"num_experts": 3, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0}
        model = transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**bart | routed))
    elif family == "seamless":
        names = {"d_model": "hidden_size", "init_std": "initializer_range"}
        given = {names.get(name, name): value for name, value in bart.items()}
        marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
        model = transformers.SeamlessM4TForTextToText(transformers.SeamlessM4TConfig(**given, **marks))
    elif family.startswith("mbart"):
        model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**bart))
    elif family == "marian-separate":  # 60 pieces of the target's; padding is the last of those
        ids = {"pad_token_id": 59, "decoder_start_token_id": 59, "eos_token_id": 0, "decoder_vocab_size": 60}
        ids |= {"share_encoder_decoder_embeddings": False}
        model = transformers.MarianMTModel(transformers.MarianConfig(**bart | ids))
    elif family.startswith("marian"):
        ids = {"pad_token_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1, "eos_token_id": 0}
        model = transformers.MarianMTModel(transformers.MarianConfig(**bart | ids))
    elif family == "t5gemma":
        stack = {
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "query_pre_attn_scalar": 6,
            "sliding_window": 3,
            "initializer_range": 0.2,
        }
        config = transformers.T5GemmaConfig(encoder=dict(stack), decoder=dict(stack), vocab_size=vocab_size)
        model = transformers.T5GemmaForConditionalGeneration(config)
    else:
        shape = {
            "vocab_size": vocab_size,
            "d_model": 16,
            "d_kv": 6,
            "d_ff": 24,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }
        if family == "t5-tied":  # T5 1.0: the decoder's output is scaled by d^-0.5
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape))
            assert model.config.scale_decoder_outputs
        elif family == "mt5":
            model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**shape))
        elif family == "umt5":
            config = transformers.UMT5Config(**shape, tie_word_embeddings=False)
            model = transformers.UMT5ForConditionalGeneration(config)
        else:  # T5 1.1, MADLAD
            config = transformers.T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            model = transformers.T5ForConditionalGeneration(config)
            assert not model.config.scale_decoder_outputs
        if family != "t5-tied":  # as the checkpoints have it; the classes tie whatever is not given apart
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.all_tied_weights_keys.pop("lm_head.weight")
    return spread(model).eval()


def spread(model):
    """Random norms and biases, so that a forgotten one shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "T5For" in type(model).__name__ and "relative" not in name:  # no d^-0.5 in its attention
                parameter.copy_(0.2 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """family -> tokenizer, made once."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = make_tokenizer(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def make(tokenizers):
    """make(family, layers=1, seed=0) -> a fresh (model, tokenizer)."""

    def build(family: str, layers: int = 1, seed: int = 0):
        tokenizer = tokenizers(family)
        rows = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1, 0)
        rows = max(rows, 1 + max(getattr(tokenizer, "lang_token_to_id", {"": 0}).values()))
        return make_model(family, rows, layers, seed), tokenizer

    return build


def batch(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Odd-sized input ids, a mask with padding, labels."""
    draw = torch.Generator().manual_seed(seed)
    rows = model.config.vocab_size
    ids = torch.randint(4, rows - 1, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(4, rows - 1, (3, 5), generator=draw),
    }


@torch.no_grad()
def logits(model, seed: int = 0) -> torch.Tensor:
    return model(**batch(model, seed)).logits.float()
