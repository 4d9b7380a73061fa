"""Fuses the orthogonality term of PEFT's AdaLoRA: python examples/peft_adalora.py

The two lines marked with <- are all that changes. Needs peft and transformers; some seconds.
"""

from __future__ import annotations

import time

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from orthoreg_ext.integrations.peft import fuse_adalora  # <- orthoreg_ext

STEPS = 30


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    adapters = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=8,
        target_r=4,
        tinit=5,
        tfinal=10,
        deltaT=5,
        total_step=STEPS,
        orth_reg_weight=0.5,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    )
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    fuse_adalora(model)  # <- orthoreg_ext
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    tokens = torch.arange(24).remainder(12).expand(8, -1)  # a text to learn by heart

    start = time.perf_counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"{1000 * (time.perf_counter() - start) / STEPS:.1f} ms a step")


if __name__ == "__main__":
    main()
