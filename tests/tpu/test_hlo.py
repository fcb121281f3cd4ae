import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tpu import programs
from tests.tpu.update import GATED
from webssl_jax.plan import hlo
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import slices

GROUPS = [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[4], to_apply=%add", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}", [[0, 1, 2, 3]]),
    (
        "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, d={0}",
        [[0, 1], [2, 3]],
    ),
]


@pytest.mark.parametrize("attributes, groups", GROUPS)
def test_every_notation_of_replica_groups_is_read(attributes, groups):
    np.testing.assert_array_equal(hlo.groups_of(attributes, 4), groups)


def test_an_unknown_notation_is_an_error_and_no_guess():
    with pytest.raises(ValueError, match="does not know"):
        hlo.groups_of("replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}", 4)


def test_bytes_are_those_of_the_values_without_tiles():
    assert hlo.array_bytes("bf16[6,256,1024]{2,1,0:T(8,128)(2,1)S(1)}") == 2 * 6 * 256 * 1024
    assert hlo.array_bytes("(f32[24,96]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, pred[3]{0})") == 9223


def program(body: str, head: str = "HloModule m, num_partitions=4") -> hlo.Cost:
    return hlo.cost(f"{head}\nENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n")


WIRES = [
    ("f32[32,16]", "all-gather(%p), dimensions={0}, ", 512 * 3, True),
    ("f32[2,16]", "reduce-scatter(%p), dimensions={0}, to_apply=%add, ", 512 * 3 / 4, True),
    ("f32[8,16]", "all-reduce(%p), to_apply=%add, ", 2 * 512 * 3 / 4, True),
    ("f32[8,16]", "all-to-all(%p), dimensions={0}, ", 512 * 3 / 4, True),
    ("(f32[8,16], f32[32,16])", "all-gather-start(%p), dimensions={0}, ", 512 * 3, False),
]


@pytest.mark.parametrize("shape, operation, wire, exposed", WIRES)
def test_wire_bytes_are_those_of_a_ring(shape, operation, wire, exposed):
    cost = program(f"""  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %c = {shape} {operation}replica_groups={{{{0,1,2,3}}}}""")
    (found,) = cost.collectives
    assert (found.wire, found.exposed, found.count) == (wire, exposed, 1)


def test_a_permute_sends_its_operand_and_one_to_itself_sends_nothing():
    for pairs, sent in (("{0,1},{1,0}", 512), ("{0,0},{1,1}", 0)):
        cost = program(f"""  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %c = f32[8,16] collective-permute(%p), source_target_pairs={{{pairs}}}""")
        assert sum(c.wire for c in cost.collectives) == sent


def test_a_collective_of_one_device_costs_nothing():
    cost = program("""  %p = f32[8,16]{1,0} parameter(0)
  ROOT %c = f32[8,16] all-reduce(%p), replica_groups={{0},{1},{2},{3}}, to_apply=%add""")
    assert cost.collectives == ()


APART = """HloModule m, num_partitions=4
%start (p: f32[8,16]) -> f32[32,16] {
  %p = f32[8,16] parameter(0)
  %g = f32[32,16] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %s = f32[32,16] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%piece (p: f32[8,16]) -> f32[32,16] {
  %p = f32[8,16] parameter(0)
  ROOT %g = f32[32,16] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}
%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16] parameter(0)
  %r = f32[8,16] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %d = f32[2,16] dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={2,16}
}
%inside (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16] parameter(0)
  ROOT %r = f32[2,16] reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
ENTRY %main (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16] parameter(0)
  %a = f32[32,16] fusion(%p), kind=kCustom, calls=%start
  %b = f32[32,16] fusion(%p), kind=kCustom, calls=%piece
  %c = ((f32[8,16]), f32[2,16]) async-start(%p), calls=%inside
  ROOT %d = f32[2,16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_gather_in_pieces_counts_once_and_what_is_started_apart_is_hidden():
    found = {c.kind + " hidden" * (not c.exposed): c.wire for c in hlo.cost(APART).collectives}
    assert found == {
        "all-gather hidden": 512 * 3,
        "reduce-scatter hidden": 512 * 3 / 4,
        "reduce-scatter": 512 * 3 / 4,  # the fusion of a sum and a cut
    }
    assert len(hlo.cost(APART).collectives) == 3


def test_a_sentinel_is_not_taken_for_cycles():
    cost = program("""  %p = f32[8,16]{1,0} parameter(0)
  %a = f32[8,16] copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %b = f32[8,16] copy(%a), backend_config={"estimated_cycles":"70"}""")
    assert cost.cycles == 70


KERNEL = """  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %k.1 = bf16[8,16]{1,0:T(8,128)(2,1)} custom-call(%p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[8,16]{1,0}}, frontend_attributes={kernel_metadata={
"mine":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/mine/pallas_call"}, \
backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"96"}}}\
"""


def test_a_kernel_costs_what_is_given_for_it_and_is_named_where_nothing_is():
    text = f"HloModule m\nENTRY %main (p: bf16[8,16]) -> bf16[8,16] {{\n{KERNEL}\n}}\n"
    (kernel,) = hlo.kernels_of(text)
    assert (kernel.name, kernel.operands) == ("k.1", [("bfloat16", [8, 16])])
    assert kernel.results == kernel.operands and '"body": "TUzv"' in kernel.config
    priced, free = hlo.cost(text, {"k.1": 40}), hlo.cost(text)
    assert (priced.cycles, priced.unpriced) == (40, ())
    assert (free.cycles, free.unpriced) == (0, ("mine/pallas_call",))
    assert priced.flops == free.flops == 96


def test_a_batched_product_written_as_a_dilated_convolution_counts_once_a_member():
    # (16, 4, 10, 32) x (16, 4, 32, 10), as the TPU compiler writes it
    cost = program("""  %p = bf16[16,10,4,32] parameter(0)
  %q = bf16[16,10,4,32] parameter(1)
  ROOT %c = f32[16,4,10,10] convolution(%p, %q), window={size=16x4 stride=15x3 lhs_dilate=16x4}, \
dim_labels=0b1f_0o1i->01bf""")
    assert cost.flops == 2 * 16 * 4 * 10 * 10 * 32


def test_a_loop_of_unknown_length_is_named():
    cost = hlo.cost("""HloModule m, num_partitions=1
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %p = (s32[], f32[8]) parameter(0)
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %c = pred[] custom-call(%p), custom_call_target="Test"
}
ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%condition, body=%body
}
""")
    assert cost.unknown_loops == ("body",)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.cost("HloModule m\n")


# Not the head: its teacher and its student share logits, which the compiler multiplies out once.
@pytest.mark.parametrize("name", ["loop", "trunk"])
def test_flops_agree_with_the_count_of_the_jaxpr(name):
    compiled, counted = programs.compiled(name, GATED[name])
    cost = hlo.cost(compiled.as_text())
    assert cost.unknown_loops == ()
    assert cost.flops * 4 == counted


def test_wire_bytes_of_a_sharded_scan_are_the_hand_figure():
    compiled, _ = programs.compiled("loop", "v5e-4")
    sent = {}
    for c in hlo.cost(compiled.as_text()).collectives:
        sent[c.kind] = sent.get(c.kind, 0) + c.count * c.wire
    weights = programs.LAYERS * programs.WIDTH**2 * 2  # in bfloat16
    # gathered in the forward and in the backward pass; their gradients summed and cut
    assert sent["all-gather"] == 2 * weights * 3 / 4
    assert sent["reduce-scatter"] == weights * 3 / 4


def test_bytes_between_slices_are_those_of_the_gradients_that_a_device_holds():
    """The rows are cut over two slices, the weights within each: a gradient is summed and cut
    within the slice, and its part goes to the other one."""
    shape = ConfigDict({"replica": 2, "fsdp": -1, "tensor": 1})
    mesh = meshes.create(shape, slices.find("v5e-4").devices(2))
    cost = hlo.cost(programs.lower("loop", mesh)[0].compile().as_text())
    weights = programs.LAYERS * programs.WIDTH**2 * 2  # in bfloat16
    print(cost.between_slices / (weights / 4))
    assert cost.between_slices == weights / 4
