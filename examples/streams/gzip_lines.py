"""A small byte-level language model on lines of gzip files: streams, read as they are needed, on any number of workers.

    python gzip_lines.py texts                    # on one worker; writes a few files there first if there are none
    unisono run --workers 3 gzip_lines.py texts   # the same weights, bit for bit

Stop it, kill a worker, start it again on another number of workers: each stream goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import pydoc_data.topics

import torch
from torch import nn
from torch.nn import functional as F

import unisono

WINDOW = 64
STREAMS = 8


class Windows:
    """Lines of some files, joined and cut into windows of equal length. The state says where it is, so it resumes at once."""

    def __init__(self, files):
        self.files = files
        self.file = 0
        self.offset = 0  # in the text of that file
        self.rest = b""  # of lines that were read and not given away yet

    def __iter__(self):
        while True:
            while len(self.rest) > WINDOW:
                window, self.rest = self.rest[: WINDOW + 1], self.rest[WINDOW:]
                yield torch.tensor(list(window))
            if self.file == len(self.files):
                return
            with gzip.open(self.files[self.file]) as text:
                text.seek(self.offset)
                for line in text:
                    self.offset += len(line)
                    self.rest += line
                    while len(self.rest) > WINDOW:
                        window, self.rest = self.rest[: WINDOW + 1], self.rest[WINDOW:]
                        yield torch.tensor(list(window))
            self.file, self.offset = self.file + 1, 0

    def state_dict(self):
        return {"file": self.file, "offset": self.offset, "rest": self.rest.decode("latin-1")}

    def load_state_dict(self, state):
        self.file, self.offset, self.rest = state["file"], state["offset"], state["rest"].encode("latin-1")


class Model(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens):
        return self.head(self.memory(self.embedding(tokens))[0])


def loss(model, windows):
    logits = model(windows[:, :-1])
    targets = windows[:, 1:]
    return F.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1), reduction="sum"), targets.numel()


def write_some(folder):
    """Python's own help texts, as so many files as there are streams."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(pydoc_data.topics.topics.values())
    for number in range(STREAMS):
        with gzip.open(folder / f"part-{number}.txt.gz", "wt", encoding="utf-8") as file:
            file.writelines(texts[number::STREAMS])


def main(arguments=None, callbacks=()):
    parser = argparse.ArgumentParser(description="A small language model on lines of gzip files.")
    parser.add_argument("folder", type=pathlib.Path, help="holds *.txt.gz")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run-dir", default="runs/gzip_lines")
    options = parser.parse_args(arguments)
    if not list(options.folder.glob("*.txt.gz")):
        write_some(options.folder)
    files = sorted(options.folder.glob("*.txt.gz"))

    def open_stream(stream, of):
        return Windows(files[stream::of])

    torch.manual_seed(0)
    model = Model()
    trainer = unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        loss,
        batch_size=64,
        microbatches=STREAMS,
        run_dir=options.run_dir,
        checkpoint_every=50,
        callbacks=callbacks,
    )
    trainer.fit(unisono.Streams(open_stream, shuffle=200), steps=options.steps)


if __name__ == "__main__":
    main()
