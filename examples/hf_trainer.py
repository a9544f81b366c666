"""Trains an adapter with transformers' Trainer, then brings it back from the checkpoint that Trainer wrote."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import petl_kernels as pk

ROOT = Path(__file__).resolve().parents[1]
PARENT = ROOT / "python/petl_mt/demo/parent"  # ships with the package: 6.6M parameters

tokenizer = AutoTokenizer.from_pretrained(PARENT, src_lang="en", tgt_lang="de")
english, german = ((ROOT / f"examples/text/train.{code}").read_text("utf-8").splitlines() for code in ("en", "de"))
pairs = [tokenizer(source, text_target=target) for source, target in zip(english, german, strict=True)]

model = AutoModelForSeq2SeqLM.from_pretrained(PARENT, dtype=torch.float32)
model = pk.adapt(model, pk.Adapter(bottleneck=64), name="dates")
pk.lean(model, tier=1)

with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=10, per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=2, save_steps=10,
        use_cpu=True, report_to="none", disable_tqdm=True, seed=1,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    trainer = Trainer(model, arguments, train_dataset=pairs, data_collator=collate)
    trainer.train()
    print("losses:", *(f"{entry['loss']:.2f}" for entry in trainer.state.log_history if "loss" in entry))

    # The checkpoint holds the plain model, and the adapter in a folder of its name.
    plain = AutoModelForSeq2SeqLM.from_pretrained(Path(folder, "checkpoint-10"), dtype=torch.float32)
    again = pk.load_adapter(plain, Path(folder, "checkpoint-10"))
    batch = collate(pairs[:4])
    with torch.no_grad():
        difference = (again.eval()(**batch).loss - model.eval()(**batch).loss).abs().item()
    print(f"loss of the loaded adapter, less that of the trained one: {difference:.1e}")
