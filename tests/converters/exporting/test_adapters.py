"""What adapter_config.json says of adapters, as PEFT finds them in a model with fused experts.

PEFT itself is not among the tests' packages: with 0.21.2 and Transformers 5.23.0 the logits of a
small model were those of its merged weights (docs/runs.md).
"""

from converters.exporting.adapters import targets

LAYER = "base_model.model.model.layers.1."


def of(*modules: str) -> dict[str, list[str]]:
    return targets(f"{LAYER}{module}.lora_{matrix}.weight" for module in modules for matrix in "AB")


def test_routed_experts_are_modules_and_other_mlps_parameters():
    experts = (f"mlp.experts.{e}.{each}_proj" for e in range(3) for each in ("up", "gate", "down"))
    found = of("self_attn.o_proj", "mlp.gate_proj", "mlp.shared_experts.up_proj", *experts)
    assert found == {
        "target_modules": ["down_proj", "gate_proj", "o_proj", "up_proj"],
        "target_parameters": ["mlp.gate_proj.weight", "shared_experts.up_proj.weight"],
    }


def test_a_shared_expert_alone_asks_for_no_routed_ones():
    found = of("mlp.shared_experts.up_proj", "self_attn.q_a_proj")
    assert found["target_modules"] == ["q_a_proj"]


def test_without_such_mlps_there_are_modules_only():
    assert of("eh_proj", "self_attn.o_proj") == {"target_modules": ["eh_proj", "o_proj"]}
