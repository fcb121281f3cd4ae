"""The least time of small programs whose flops and bytes are counted by hand."""

import pytest

from webssl_jax.plan import limits

# a second: 1000 flops, 10 bytes of HBM, 4 bytes to others, 100 cycles
RATES = limits.Rates(1000.0, 10.0, 4.0, 100.0)
TIMED = 'backend_config={"estimated_cycles":"900"}'


def found(body: str, others: str = "", params: str = "p: f32[8,4]") -> dict[str, limits.Operation]:
    text = (
        f"HloModule m, num_partitions=4\n{others}\nENTRY %main ({params}) -> f32[] {{\n{body}\n}}\n"
    )
    return {operation.name: operation for operation in limits.operations(text, RATES)}


def least(found: dict[str, limits.Operation]) -> dict[str, float]:
    return {name: operation.least_s for name, operation in found.items()}


def test_an_operation_takes_the_longest_of_products_memory_and_wire():
    rows = found(f"""  %p = f32[8,4]{{1,0}} parameter(0)
  %q = f32[4,100]{{1,0:T(8,128)S(1)}} parameter(1)
  %dot = f32[8,100]{{1,0:T(8,128)S(1)}} dot(%p, %q), lhs_contracting_dims={{1}}, {TIMED}
  %neg = f32[8,4]{{1,0}} negate(%p), {TIMED}
  %vmem = f32[8,100]{{1,0:T(8,128)S(1)}} negate(%dot), {TIMED}
  ROOT %sum = f32[8,4]{{1,0}} all-reduce(%neg), replica_groups={{{{0,1,2,3}}}}, to_apply=%add""")
    # 8 x 100 x 4 multiply-adds beside 128 bytes; 2 x 128 bytes; none; 1.5 x 128 bytes sent
    assert least(rows) == {"dot": 12.8, "neg": 25.6, "vmem": 0, "sum": 48}
    assert rows["dot"].flops == 6400
    assert [rows[x].modelled_s for x in ("dot", "neg", "sum")] == [9, 9, 48]
    assert rows["sum"].lost_s == 0 and rows["neg"].lost_s == pytest.approx(9 - 25.6)


def test_a_product_of_float32_at_full_precision_is_six_of_bfloat16():
    body = """  %p = f32[8,4]{{1,0:S(1)}} parameter(0)
  ROOT %dot = f32[8,8]{{1,0:S(1)}} dot(%p, %p), lhs_contracting_dims={{1}}{}"""
    one = found(body.format(""))["dot"]
    six = found(body.format(", operand_precision={highest,highest}"))["dot"]
    assert six.least_s == 6 * one.least_s and six.flops == one.flops == 512


LOOP = """%cut (a: f32[5,8,4], b: s32[]) -> f32[8,4] {
  %a = f32[5,8,4]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %view = f32[5,8,4]{2,1,0} bitcast(%a)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%view, %b, %b, %b), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%one)
}
%put (a: f32[5,8,4], b: f32[8,4], c: s32[]) -> f32[5,8,4] {
  %a = f32[5,8,4]{2,1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = s32[] parameter(2)
  %one = f32[1,8,4]{2,1,0} bitcast(%b)
  ROOT %new = f32[5,8,4]{2,1,0} dynamic-update-slice(%a, %one, %c, %c, %c)
}
%body (t: (s32[], f32[5,8,4])) -> (s32[], f32[5,8,4]) {
  %t = (s32[], f32[5,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %all = f32[5,8,4]{2,1,0} get-tuple-element(%t), index=1
  %get = f32[8,4]{1,0} fusion(%all, %i), kind=kLoop, calls=%cut
  %set = f32[5,8,4]{2,1,0} fusion(%all, %get, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[5,8,4]{2,1,0}) tuple(%i, %set)
}
%test (t: (s32[], f32[5,8,4])) -> pred[] {
  %t = (s32[], f32[5,8,4]{2,1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%t), custom_call_target="Test"
}
"""


def test_a_loop_over_a_stack_moves_one_layer_at_a_time():
    rows = found(
        """  %p = (s32[], f32[5,8,4]{2,1,0}) parameter(0)
  ROOT %w = (s32[], f32[5,8,4]{2,1,0}) while(%p), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}""",
        LOOP,
    )
    # of each turn: a layer and its index read, a layer written
    assert {name: row.hbm_bytes for name, row in rows.items()} == {"get": 5 * 260, "set": 5 * 260}
    assert {row.category for row in rows.values()} == {"copies and layout"}


APART = """  %p = f32[8,4]{{1,0}} parameter(0)
  %a = (f32[8,4], f32[16,4]) all-gather-start(%p), replica_groups=[2,2]<=[4], dimensions={{0}}
  %b = (f32[8,4], f32[16,4]) all-gather-start(%p), replica_groups=[2,2]<=[4], dimensions={{0}}
  %between = f32[{0},4]{{1,0}} copy(%p)
  %a.done = f32[16,4] all-gather-done(%a)
  ROOT %b.done = f32[16,4] all-gather-done(%b)"""


@pytest.mark.parametrize(
    "rows, waits",
    # 128 bytes take 32 seconds on the wire, one after the other; rows of 16 bytes that are written,
    # beside 128 that are read, 1.6 seconds each beside 12.8
    [(2, (16, 32)), (12, (0, 32)), (22, (0, 16)), (32, (0, 0))],
)
def test_what_is_sent_apart_hides_behind_what_lies_between_and_the_rest_waits(rows, waits):
    rows = least(found(APART.format(rows)))
    assert (rows["a"], rows["b"]) == pytest.approx(waits)


@pytest.mark.parametrize("between, waits", [("dot", 0), ("negate", 12.8)])
def test_a_copy_apart_has_the_memory_that_the_operations_between_leave(between, waits):
    operation = {
        "dot": "dot(%v, %v), lhs_contracting_dims={1}",  # 12.8 s, none of them at HBM
        "negate": "negate(%p)",  # 25.6 s, all of them
    }[between]
    space = "{1,0:T(8,128)S(1)}" if between == "dot" else "{1,0}"
    rows = found(f"""  %p = f32[8,4]{{1,0}} parameter(0)
  %v = f32[8,100]{{1,0:T(8,128)S(1)}} parameter(1)
  %start = (f32[8,4]{{1,0:T(8,128)S(1)}}, f32[8,4]{{1,0}}, u32[]{{:S(2)}}) copy-start(%p)
  %between = f32[8,{8 if between == "dot" else 4}]{space} {operation}
  ROOT %done = f32[8,4]{{1,0:T(8,128)S(1)}} copy-done(%start)""")
    assert rows["between"].least_s == pytest.approx(12.8 if between == "dot" else 25.6)
    assert rows["start"].least_s == pytest.approx(waits)
    assert rows["start"].category == "copies and layout"


PLACES = [
    ("attention", "jvp(encoder)/blocks/attn/bqgc,bskgc->bsgqk/dot_general", "negate(%p)"),
    ("products", "jvp(encoder)/blocks/attn/q/dot_general", "dot(%p, %p), lhs_contracting_dims={1}"),
    ("norms", "transpose(jvp(encoder))/blocks/norm1/mul", "negate(%p)"),
    ("copies and layout", "jvp(encoder)/blocks/norm1/transpose", "transpose(%p), dimensions={1,0}"),
    ("element-wise", "jvp(encoder)/blocks/mlp/tanh", "tanh(%p)"),
    ("optimiser", "mul", "negate(%p)"),
    ("exposed ICI", "jvp()/add", "all-reduce(%p), replica_groups={}, to_apply=%add"),
]


@pytest.mark.parametrize("category, place, operation", PLACES)
def test_an_operation_belongs_to_a_category_by_its_place_and_what_it_does(
    category, place, operation
):
    rows = found(f"""  %p = f32[8,8]{{1,0}} parameter(0)
  %x = f32[8,8]{{1,0}} {operation}, metadata={{op_name="jit(step)/{place}"}}
  ROOT %y = f32[8,8]{{1,0}} negate(%p), metadata={{op_name="jit(step)/jvp()/neg"}}""")
    assert rows["x"].category == category


def test_a_program_that_does_not_train_has_no_optimiser():
    rows = found("""  %p = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} negate(%p), metadata={op_name="jit(read)/neg"}""")
    assert rows["y"].category == "element-wise"


def test_categories_and_operations_come_with_the_worst_loss_first():
    rows = found(f"""  %p = f32[8,8]{{1,0:S(1)}} parameter(0)
  %a = f32[8,8]{{1,0:S(1)}} negate(%p)
  %b = f32[8,8]{{1,0:S(1)}} copy(%p), {TIMED}
  ROOT %c = f32[8,8]{{1,0:S(1)}} negate(%p), {TIMED.replace("900", "1000")}""")
    ordered = limits.by_category(list(rows.values()))
    names = {category: [x.name for x in of_it] for category, of_it in ordered.items()}
    assert names == {"element-wise": ["c", "a"], "copies and layout": ["b"]}
    assert list(names) == ["element-wise", "copies and layout"]


PIECES = """%start (p: f32[8,4]) -> (f32[8,4], f32[16,4]) {
  %p = f32[8,4]{1,0} parameter(0)
  %g = f32[16,4]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %s = (f32[8,4], f32[16,4]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%piece (t: (f32[8,4], f32[16,4]), q: f32[8,100]) -> (f32[8,8], f32[16,4]) {
  %t = (f32[8,4]{1,0}, f32[16,4]{1,0}) parameter(0)
  %q = f32[8,100]{1,0} parameter(1)
  %p = f32[8,4]{1,0} get-tuple-element(%t), index=0
  %dot = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}
  %g = f32[16,4]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"1"}}
  ROOT %both = (f32[8,8]{1,0}, f32[16,4]{1,0}) tuple(%dot, %g)
}
%done (t: (f32[8,8], f32[16,4])) -> f32[16,4] {
  %t = (f32[8,8]{1,0}, f32[16,4]{1,0}) parameter(0)
  %g = f32[16,4]{1,0} get-tuple-element(%t), index=1
  ROOT %d = f32[16,4]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_gather_in_pieces_beside_a_product_hides_behind_it():
    rows = found(
        """  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[8,100]{1,0:S(1)} parameter(1)
  %a = (f32[8,4]{1,0}, f32[16,4]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %b = (f32[8,8]{1,0:S(1)}, f32[16,4]{1,0}) fusion(%a, %q), kind=kOutput, calls=%piece
  ROOT %c = f32[16,4]{1,0} fusion(%b), kind=kCustom, calls=%done""",
        PIECES,
    )
    # 128 bytes take 32 seconds on the wire, the product 12.8
    assert rows["b"].least_s == pytest.approx(12.8) and rows["b"].category == "products"
    assert rows["a"].least_s == pytest.approx(32 - 12.8) and rows["a"].wire_bytes == 128
    assert rows["c"].least_s == 0 and sum(row.wire_bytes for row in rows.values()) == 128
