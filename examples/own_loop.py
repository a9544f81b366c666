"""Trains a LoRA adapter in a training loop of your own, and saves it in the format that PEFT reads."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import petl_kernels as pk

ROOT = Path(__file__).resolve().parents[1]
PARENT = ROOT / "python/petl_mt/demo/parent"  # ships with the package: 6.6M parameters
BATCH, UPDATES = 16, 12  # pairs to one update, and how many updates

torch.manual_seed(1)
tokenizer = AutoTokenizer.from_pretrained(PARENT, src_lang="en", tgt_lang="de")
model = AutoModelForSeq2SeqLM.from_pretrained(PARENT, dtype=torch.float32)
english, german = ((ROOT / f"examples/text/train.{code}").read_text("utf-8").splitlines() for code in ("en", "de"))

model = pk.adapt(model, pk.LoRA(rank=16, alpha=32), name="dates")  # freezes the model, trains the adapter
pk.lean(model, tier=2)  # keeps less between forward and backward, with the same gradients
print(pk.report(model))

optimizer = torch.optim.AdamW(pk.trainable_parameters(model), lr=5e-3)
model.train()
for update in range(UPDATES):
    rows = slice(update * BATCH, (update + 1) * BATCH)
    batch = tokenizer(english[rows], text_target=german[rows], padding=True, return_tensors="pt")
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100  # padding has no loss
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"update {update + 1}: loss {loss.item():.2f} nats a token")

model.eval()
source = tokenizer("Wednesday, March 4, 2048", return_tensors="pt")
for name in (None, "dates"):  # without the adapter, and with it
    pk.use_adapter(model, name)
    words = model.generate(**source, forced_bos_token_id=tokenizer.get_lang_id("de"), max_new_tokens=40)
    print(f"adapter {name}:", tokenizer.decode(words[0, 2:], skip_special_tokens=True))  # behind start and language

with TemporaryDirectory() as folder:
    pk.save_adapter(model, folder)
    print("saved:", *sorted(path.name for path in Path(folder, "dates").iterdir()))
