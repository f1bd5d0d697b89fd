#!/bin/sh
# Guess: gradient_accumulation_steps=2 with batches of 4 trains as batches of 8 do, up to rounding.
# Seen with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 on CPU, Python 3.11, 2026-11-30: where forward takes **kwargs but its loss
# does not read num_items_in_batch (BertForSequenceClassification, MSE for one label), Trainer takes the loss for normalised and adds
# means up: loss and gradient are gradient_accumulation_steps times too large. GPT-2, whose loss reads it, is right.
# Why it matters: the learning rate is multiplied in effect, clipping sets in earlier, and logged losses cannot be compared.
# Output: BERT: loss 1.1 at once, 2.2 in two parts; GPT-2: equal
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0
cat > "$dir/see.py" <<'EOP'
import torch
import transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}

def first_step(model, labels, parts):
    torch.manual_seed(0)
    words = torch.randint(0, 40, (8, 6))
    arguments = transformers.TrainingArguments(
        "out", per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_steps=1, logging_steps=1,
        save_strategy="no", report_to=[], train_sampling_strategy="sequential", use_cpu=True,
    )
    data = [{"input_ids": line, "labels": labels(line)} for line in words]
    trainer = transformers.Trainer(model(), arguments, train_dataset=data)
    trainer.train()
    return trainer.state.log_history[0]

def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, intermediate_size=16, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return transformers.BertForSequenceClassification(config)

def gpt():
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))

for name, model, labels, expected in (("BERT", bert, lambda line: line[0] % 3, 2), ("GPT-2", gpt, lambda line: line, 1)):
    whole, parted = first_step(model, labels, 1), first_step(model, labels, 2)
    for key in ("loss", "grad_norm"):
        print(name, key, whole[key], parted[key])
        assert abs(parted[key] / whole[key] - expected) < 1e-4
EOP
cd "$dir"
venv/bin/python see.py || exit 1
