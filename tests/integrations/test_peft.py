"""fuse_adalora in real training runs of PEFT's AdaLoRA, against its own loop."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from orthoreg_ext.build_info import compiled
from tests.integrations.examples import check_adoption, framework, run_example

STEPS = 6


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    framework("transformers", "peft")
    return importlib.import_module("peft")


@pytest.fixture(scope="module")
def fused(peft: ModuleType) -> ModuleType:
    return importlib.import_module("orthoreg_ext.integrations.peft")


def make_model(
    peft: ModuleType, rank: int = 4, weight: float = 0.5, task: str | None = "CAUSAL_LM"
) -> nn.Module:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    config = peft.AdaLoraConfig(
        init_r=rank,
        target_r=2,
        tinit=1,
        tfinal=2,
        deltaT=1,
        total_step=STEPS,
        orth_reg_weight=weight,
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type=task,
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and p.dim() == 2:
                p.normal_(std=0.3)
    return model


def tokens() -> Tensor:
    return torch.arange(40).remainder(7).view(4, 10)


def backward(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def train(model: nn.Module) -> tuple[list[float], list[dict[str, Tensor]]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1, momentum=0.9)
    losses, seen = [], []
    for step in range(STEPS):
        loss, found = backward(model)
        losses.append(loss)
        seen.append(found)
        optimizer.step()
        model.base_model.update_and_allocate(step)  # cuts ranks
    return losses, seen


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, other in others.items():
        assert ours[name].shape == other.shape
        if other.numel():
            scale = max(other.abs().max().item(), 1.0)
            assert (ours[name] - other).abs().max().item() <= 1e-6 * scale, name


def test_run_equals_the_loop_of_peft(peft: ModuleType, fused: ModuleType) -> None:
    """With budgets that are allocated: the ranks that are cut are the same."""
    plain, model = make_model(peft), make_model(peft)
    without, _ = backward(make_model(peft, weight=0.0))
    losses, seen = train(plain)
    fused.fuse_adalora(model)
    ours, found = train(model)
    assert ours == pytest.approx(losses, rel=1e-6)
    assert losses[0] > without + 0.1, "the term did nothing"
    for mine, other in zip(found, seen, strict=True):
        assert_same(mine, other)
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert (
        model.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern != {}
    )


@pytest.mark.parametrize("rank", [1, 8, 16, 20])
def test_ranks_up_to_and_above_the_size_of_a_layer(
    peft: ModuleType, fused: ModuleType, rank: int
) -> None:
    """Above it, the Gram matrix of size r is not the smaller one."""
    plain, model = make_model(peft, rank), make_model(peft, rank)
    fused.fuse_adalora(model)
    loss, expected = backward(plain)
    ours, found = backward(model)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_same(found, expected)


@pytest.mark.skipif(not compiled, reason="plain PyTorch takes the layers one by one")
def test_all_matrices_are_one_call(peft: ModuleType, fused: ModuleType) -> None:
    names: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    model = make_model(peft)
    fused.fuse_adalora(model)
    with Record():
        model.base_model._orthogonality()
    assert [name for name in names if name.startswith("orthoreg")] == [
        "orthoreg.gram_penalty.default"
    ]
    assert not {"aten.mm.default", "aten.linalg_vector_norm.default"} & set(names)


def test_adapters_without_ranks_and_orthonormal_ones(peft: ModuleType, fused: ModuleType) -> None:
    """At the minimum the norm has no gradient; PEFT takes 0."""
    pair = make_model(peft), make_model(peft)
    for model in pair:
        for i, layer in enumerate(model.base_model.model.model.layers):
            q = layer.self_attn.q_proj
            if i == 0:
                q.lora_A["default"] = nn.Parameter(torch.eye(4, 16))
            else:
                q.update_layer("default", 0, 32, config=model.peft_config["default"])
    fused.fuse_adalora(pair[1])
    (loss, expected), (ours, found) = map(backward, pair)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_same(found, expected)


def test_only_the_names_that_peft_takes(peft: ModuleType, fused: ModuleType) -> None:
    """The trainable adapter's, and those of any whose name contains it, as in PEFT's loop."""
    pair = make_model(peft), make_model(peft)
    for model in pair:
        for name in ("default_old", "other"):
            config = copy.deepcopy(model.peft_config["default"])
            config.inference_mode, config.init_r = True, 3
            torch.manual_seed(5)
            model.add_adapter(name, config)
    fused.fuse_adalora(pair[1])
    (loss, expected), (ours, found) = map(backward, pair)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_same(found, expected)


def test_forward_without_a_loss_and_wrong_weights(peft: ModuleType, fused: ModuleType) -> None:
    model = make_model(peft)
    fused.fuse_adalora(model)
    assert model(input_ids=tokens()).loss is None
    model.peft_config["default"].orth_reg_weight = -1.0
    with pytest.raises(ValueError, match="orth_reg_weight"):
        model(input_ids=tokens(), labels=tokens())
    half = make_model(peft).to(torch.bfloat16)
    plain = half(input_ids=tokens(), labels=tokens()).loss
    fused.fuse_adalora(half)
    ours = half(input_ids=tokens(), labels=tokens()).loss
    assert ours.dtype == plain.dtype
    assert ours.item() == pytest.approx(plain.item(), rel=2e-2)


def test_saving_copying_and_undoing(peft: ModuleType, fused: ModuleType, tmp_path: Any) -> None:
    model = make_model(peft)
    loss, expected = backward(model)
    handle = fused.fuse_adalora(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.base_model) is type(model.base_model)
        assert backward(twin)[0] == pytest.approx(loss, rel=1e-6)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="fused already"):
        fused.fuse_adalora(model)
    handle.remove()
    handle.remove()
    assert type(model.base_model) is peft.AdaLoraModel
    again, found = backward(model)
    assert again == loss
    assert_same(found, expected)
    fused.fuse_adalora(model.base_model)  # the inner model does as well


def test_what_cannot_work_is_refused(peft: ModuleType, fused: ModuleType) -> None:
    with pytest.raises(TypeError, match="model is a Linear, expected one with AdaLoRA"):
        fused.fuse_adalora(nn.Linear(2, 2))
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    lora = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(TypeError, match="model is a LoraModel"):
        fused.fuse_adalora(lora)
    with pytest.raises(ValueError, match="set task_type="):
        fused.fuse_adalora(make_model(peft, task=None))
    model = make_model(peft)
    model.base_model.forward = model.base_model.forward  # what accelerate's hooks do
    with pytest.raises(ValueError, match="wrapped by a hook"):
        fused.fuse_adalora(model)
    model = make_model(peft)
    fused.fuse_adalora(model)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    q.lora_A["default"] = nn.Parameter(torch.empty(0))  # as DeepSpeed leaves them
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default.*several processes"):
        model.base_model._orthogonality()


def test_example_runs_and_changes_two_lines(
    fused: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    check_adoption("peft_adalora.py")
    lines = run_example("peft_adalora.py", capsys).splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0]
