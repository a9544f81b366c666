"""Trains a LoRA adapter in a training loop of your own, and saves it in the format that PEFT reads."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import petl_kernels as pk

ROOT = Path(__file__).resolve().parents[1]
PARENT = ROOT / "python/petl_mt/demo/parent"  # ships with the package: 6.6M parameters, never trained on Finnish
BATCH = 16  # sentence pairs to one update

torch.manual_seed(1)
tokenizer = AutoTokenizer.from_pretrained(PARENT, src_lang="en", tgt_lang="fi")
model = AutoModelForSeq2SeqLM.from_pretrained(PARENT, dtype=torch.float32)
english, finnish = ((ROOT / f"examples/text/train.{code}").read_text("utf-8").splitlines() for code in ("en", "fi"))

model = pk.adapt(model, pk.LoRA(rank=16, alpha=32), name="en-fi")  # freezes the model, trains the adapter
pk.lean(model, tier=2)  # keeps less between forward and backward, with the same gradients
print(pk.report(model))

optimizer = torch.optim.AdamW(pk.trainable_parameters(model), lr=5e-3)
model.train()
for start in range(0, len(english), BATCH):
    batch = tokenizer(
        english[start : start + BATCH], text_target=finnish[start : start + BATCH], padding=True, return_tensors="pt"
    )
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100  # padding has no loss
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if start % (8 * BATCH) == 0:
        print(f"update {start // BATCH + 1}: loss {loss.item():.2f} nats a token")

with TemporaryDirectory() as folder:
    pk.save_adapter(model, folder)
    print("saved:", *sorted(path.name for path in Path(folder, "en-fi").iterdir()))
