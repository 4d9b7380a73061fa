"""Regularises a model that Transformers' Trainer trains: python examples/transformers_callback.py

The two lines marked with <- are all that changes. Needs transformers and accelerate; some seconds.
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from orthoreg_ext.integrations.transformers import OrthoRegCallback  # <- orthoreg_ext


class Sentences(Dataset):
    """Random tokens; the label says whether the first one is among the upper half."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 64, (count, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": (tokens[0] >= 32).long()}


def main() -> None:
    set_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=60,
                learning_rate=3e-3,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=2,
                logging_steps=20,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Sentences(1024, seed=0),
            eval_dataset=Sentences(256, seed=1),
            callbacks=[OrthoRegCallback(strength=1e-3)],  # <- orthoreg_ext
        )
        trainer.train()
        print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
