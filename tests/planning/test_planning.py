"""What a plan says of a step that runs nowhere yet: bytes by hand and by XLA, FLOPs, seconds, what would need less."""

import dataclasses
import math

import jax
import pytest
from tiny import TINY

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.cost import GroupShape, group_flops
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.shapes import SHAPES
from mmrlhf_jax.nn.devices import ACCELERATORS, GIB
from mmrlhf_jax.nn.params import count
from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh, shape_of_mesh
from mmrlhf_jax.objectives import DPO, MMDPO, CritiqueReward
from mmrlhf_jax.planning.compiled import Compiled, TooLarge, read_exhaustion, traced_flops
from mmrlhf_jax.planning.plan import Choices, CompiledBucket, make_plan
from mmrlhf_jax.planning.report import as_json, lines, verdict
from mmrlhf_jax.planning.step_time import Load, micro_batches, step_time
from mmrlhf_jax.planning.topology import Target, candidates, read_target
from mmrlhf_jax.training.memory import footprint, gathered_bytes
from mmrlhf_jax.training.planning import (
    abstract_batch,
    abstract_run,
    bytes_per_device,
    config_of,
    lower_accumulate,
    lower_apply,
    trace_accumulate,
)
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, LoraConfig, OptimizerConfig, Recipe
from mmrlhf_jax.training.state import PartRates

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
BUCKET = Bucket(8, 2, 256, 128)
FULL_7B = Recipe(
    objective=MMDPO(),
    data=DataConfig(slots_per_device=16384),
    optimizer=OptimizerConfig(first_moment="bfloat16"),
)


def planned(recipe, target):
    return make_plan(recipe, target, Choices(shape="7b", estimate=True), progress=print)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_on_a_device_by_hand():
    """TINY over fsdp 2 and tensor 2: width splits over fsdp; heads, inner width and vocabulary over tensor."""
    d, n, g, h, f, v = 32 // 2, 4 // 2, 2 // 2, 8, 64 // 2, 320 // 2
    layer = d * n * h + n * h + 2 * (d * g * h + g * h) + n * h * d + 2 * d + 3 * d * f
    decoder = 2 * layer + 2 * v * d + d  # two layers, table in and out, the last norm
    projector = 32 * d + d + d * 32 + d  # its kernels split over the decoder's width alone
    trains = decoder + projector + d  # and the newline
    t, heads, mlp = 32 // 2, 2 // 2, 64 // 2
    block = 4 * t + 3 * (t * heads * 16 + heads * 16) + heads * 16 * t + t + t * mlp + mlp + mlp * t + t
    tower = 14 * 14 * 3 * t + t + 9 * t + 2 * block + 2 * t
    run = abstract_run(FULL_7B, TINY, shape_of_mesh(MIXED, 8))
    assert bytes_per_device(run.state.trainable) == 4 * trains
    assert bytes_per_device(run.state.frozen) == 2 * tower
    kept = footprint(FULL_7B, TINY, BUCKET, shape_of_mesh(MIXED, 8), responses=4, platform="gpu").kept
    assert kept["parameters that train, fp32"] == 4 * trains
    assert kept["frozen parameters"] == 2 * tower
    assert kept["first moment"] == 2 * trains
    assert kept["second moment"] == 4 * trains + 8  # and two counters, Adam's and the schedule's
    assert kept["reference model"] == 0
    online = dataclasses.replace(FULL_7B, reference="online")
    kept = footprint(online, TINY, BUCKET, shape_of_mesh(MIXED, 8), responses=4, platform="gpu").kept
    assert kept["reference model"] == 2 * (trains + tower)


@pytest.mark.parametrize(
    "moments", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "factored")], ids="-".join
)
@pytest.mark.parametrize("mesh", [MeshConfig(), MIXED])
@pytest.mark.parametrize("lora", [0, 4])
def test_xla_is_given_exactly_the_bytes_that_are_planned(mesh, lora, moments):
    recipe = Recipe(
        objective=DPO(), lora=LoraConfig(rank=lora),
        optimizer=OptimizerConfig(first_moment=moments[0], second_moment=moments[1]),
        compute=ComputeConfig(dtype="float32"),
    )  # fmt: skip
    here = make_mesh(mesh)
    run = abstract_run(recipe, TINY, here)
    memory = lower_apply(recipe, TINY, here).compile().memory_analysis()
    # a factored moment has places of one number that stay unused, and jit drops them
    unused = 8 * len(jax.tree.leaves(run.state.trainable)) if moments[1] == "factored" else 0
    assert 0 <= bytes_per_device((run.state, run.sums)) - memory.argument_size_in_bytes <= unused
    kept = footprint(recipe, TINY, BUCKET, here, responses=4, platform="cpu").kept
    without = bytes_per_device(abstract_batch(BUCKET, 4, TINY, here)) * 2
    steps = 4  # the state's own counter
    assert 0 <= sum(kept.values()) - without + steps - memory.argument_size_in_bytes <= unused


def test_the_gradient_step_is_given_parameters_sums_and_a_batch():
    recipe, mesh = Recipe(objective=DPO(), compute=ComputeConfig(dtype="float32")), make_mesh(MIXED)
    run, batch = abstract_run(recipe, TINY, mesh), bytes_per_device(abstract_batch(BUCKET, 4, TINY, mesh))
    given = lower_accumulate(recipe, TINY, BUCKET, mesh).compile().memory_analysis().argument_size_in_bytes
    certain = bytes_per_device((run.state.trainable, run.state.frozen, run.sums))
    assert 0.9 * batch < given - certain <= batch + 16  # a key comes in, fields that DPO does not read stay out


def test_a_reference_that_is_the_policy_costs_nothing():
    recipe = Recipe(objective=DPO(), lora=LoraConfig(rank=4), reference="lora_off")
    run = abstract_run(recipe, TINY, shape_of_mesh(MIXED, 8))
    assert run.reference is not None
    kept = footprint(recipe, TINY, BUCKET, shape_of_mesh(MIXED, 8), responses=4, platform="gpu").kept
    assert kept["reference model"] == 0


def test_a_reward_model_is_planned_with_its_head():
    recipe = Recipe(objective=CritiqueReward())
    config = config_of(recipe, TINY)
    mesh = shape_of_mesh(MeshConfig(), 1)
    more = bytes_per_device(abstract_run(recipe, config, mesh).state.trainable)
    assert more - bytes_per_device(abstract_run(FULL_7B, TINY, mesh).state.trainable) == 4 * (32 + 1)


def test_each_rung_keeps_more_and_a_group_more_on_a_device_too():
    mesh = shape_of_mesh(MeshConfig(), 8)

    def total(rung, groups):
        recipe = dataclasses.replace(FULL_7B, compute=ComputeConfig(remat=rung))
        bucket = Bucket(8 * groups, 5, 3072, 768)
        return footprint(recipe, SHAPES["7b"], bucket, mesh, responses=4, platform="gpu").total

    rungs = [total(rung, 2) for rung in ("full", "attention", "projections", "none")]
    assert rungs == sorted(rungs)
    assert total("full", 1) < total("full", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mesh", "bucket"),
    [
        ({}, MeshConfig(), Bucket(16, 5, 3072, 768)),
        ({}, MeshConfig(fsdp=4, tensor=2), Bucket(8, 5, 3072, 768)),
        ({}, MeshConfig(), Bucket(16, 32, 6272, 768)),
        ({}, MeshConfig(), Bucket(64, 1, 768, 1024)),
        ({"compute": ComputeConfig(dtype="float32", remat="projections")}, MeshConfig(), Bucket(16, 5, 3072, 768)),
        ({"compute": ComputeConfig(dtype="float32", remat="none")}, MeshConfig(), Bucket(16, 5, 3072, 768)),
        ({"optimizer": OptimizerConfig(rates=PartRates(tower=1.0))}, MeshConfig(), Bucket(16, 5, 3072, 768)),
        ({"lora": LoraConfig(rank=16)}, MeshConfig(), Bucket(16, 5, 3072, 768)),
    ],
    ids=["full", "tensor", "video", "vocabulary", "projections", "none", "tower", "lora"],
)
def test_what_passes_is_estimated_near_what_xla_takes(changes, mesh, bucket):
    """0.5B in fp32 on eight CPU devices, compiled and not run."""
    recipe = Recipe(**{"objective": DPO(), "compute": ComputeConfig(dtype="float32"), **changes})
    here = make_mesh(mesh)
    taken = lower_accumulate(recipe, SHAPES["0.5b"], bucket, here).compile().memory_analysis().temp_size_in_bytes
    passing = footprint(recipe, SHAPES["0.5b"], bucket, here, responses=4, platform="cpu").passing
    assert sum(passing.values()) == pytest.approx(taken, rel=0.2)


def test_published_sizes():
    """Their names say 0.5, 7 and 72 billion, of the decoder without its tables or with."""
    sizes = {name: count(declare(config).decoder) / 1e9 for name, config in SHAPES.items()}
    assert sizes == {"0.5b": pytest.approx(0.494, abs=1e-3), "7b": pytest.approx(7.616, abs=1e-3),
                     "72b": pytest.approx(72.706, abs=1e-3)}  # fmt: skip


def test_groups_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(ValueError, match="7 groups of a micro-batch do not divide over data x fsdp = 8"):
        footprint(FULL_7B, TINY, Bucket(7, 1, 128, 128), shape_of_mesh(MeshConfig(), 8), responses=4, platform="gpu")


# --- FLOPs and seconds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", ["none", "full"])
def test_products_counted_in_the_program_are_those_of_the_shapes_for_any_number_of_layers(rung):
    config = dataclasses.replace(
        TINY,
        tower=dataclasses.replace(TINY.tower, layers=3, embed=64, image_size=112),
        decoder=dataclasses.replace(TINY.decoder, layers=5, embed=64, head_dim=16, mlp=192),
    )
    recipe = Recipe(
        objective=DPO(), optimizer=OptimizerConfig(rates=PartRates(tower=1.0)),
        compute=ComputeConfig(dtype="float32", remat=rung, vocab_chunk=64),
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    traced = trace_accumulate(recipe, config, Bucket(1, 2, 128, 128), mesh, responses=2)
    told = group_flops(config, GroupShape(2, 128, (64, 64)), tower=True, square=True, recompute=rung == "full")
    assert traced_flops(traced.jaxpr.jaxpr) == pytest.approx(told.total, rel=0.1)


def test_a_step_takes_as_long_as_its_slowest_stream():
    chip, mesh = ACCELERATORS["h100"], shape_of_mesh(MeshConfig(), 8)
    load = micro_batches(96, Bucket(32, 5, 3072, 768))
    assert load == Load(load.bucket, 3, 1.0)
    time = step_time(FULL_7B, SHAPES["7b"], [load], mesh, chip, responses=4, efficiency=0.5)
    shape = GroupShape(5, 3072, (192,) * 4)
    assert time.done.total == pytest.approx(96 * group_flops(SHAPES["7b"], shape, recompute=True).total)
    assert time.useful.total == pytest.approx(96 * group_flops(SHAPES["7b"], shape).total)
    assert time.seconds["compute"] == pytest.approx(time.done.total / (8 * 989.4e12 * 0.5))
    assert time.bound == "compute"
    assert time.mfu == pytest.approx(0.5 * time.useful.total / time.done.total)


def test_weights_are_gathered_twice_and_their_gradients_scattered_once_a_micro_batch():
    """A tower that is frozen is gathered once, and not scattered."""
    chip, mesh = ACCELERATORS["v5e"], shape_of_mesh(MeshConfig(), 8)
    run = abstract_run(FULL_7B, SHAPES["7b"], mesh)
    trains, tower = gathered_bytes(run.state.trainable, 2), gathered_bytes(run.state.frozen, 2)
    assert trains == pytest.approx(2 * 7.632e9, rel=1e-3)
    time = step_time(FULL_7B, SHAPES["7b"], [Load(Bucket(8, 5, 3072, 768), 1)], mesh, chip, responses=4)
    assert time.seconds["links"] == pytest.approx(7 / 8 * (3 * trains + tower) / 200e9)
    assert time.seconds["network"] == 0


def test_between_slices_and_nodes_it_is_the_network():
    config, bucket = SHAPES["7b"], Bucket(16, 5, 3072, 768)

    def seconds(mesh, chip, slices=1):
        there = shape_of_mesh(mesh, 16, slices)
        return step_time(
            FULL_7B, config, [Load(bucket, 1)], there, ACCELERATORS[chip], responses=4, slices=slices
        ).seconds  # fmt: skip

    gradients = 4 * 7.632e9 / 8  # of a device, fp32: once there, once back, half of it each
    two = seconds(MeshConfig(data=2), "v5p", slices=2)
    assert two["network"] == pytest.approx(gradients / (50e9 / 8), rel=1e-3)
    assert seconds(MeshConfig(), "v5p")["network"] == 0
    nodes = seconds(MeshConfig(), "h100")  # fsdp over two nodes
    assert nodes["network"] > 0
    assert nodes["links"] == 0
    with pytest.raises(ValueError, match="v4 between nodes"):
        seconds(MeshConfig(data=2), "v4", slices=2)


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets():
    assert read_target("v5p:8x8x4", "", 1) == Target(ACCELERATORS["v5p"], 256, 1, "8x8x4")
    assert read_target("", "h100:8", 2).total == 16
    assert str(read_target("v5e:4x4", "", 2)) == "2 slices of v5e:4x4"
    assert [one.chips for one in candidates(ACCELERATORS["v6e"])] == [1, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("topology", "device", "message"),
    [
        ("", "", "say what to plan for"),
        ("v5e:2x2", "h100:8", "say what to plan for"),
        ("v5e", "", "slices have 2 sides"),
        ("v5p:4x4", "", "slices have 3 sides"),
        ("h100:8", "", "none of v4, v5e, v5p, v6e"),
        ("", "v5e:4", "none of h100, h200"),
        ("", "h100:0", "NAME:COUNT"),
        ("", "h100", "NAME:COUNT"),
    ],
)
def test_what_names_no_chips_is_bad_usage(topology, device, message):
    with pytest.raises(UsageError, match=message):
        read_target(topology, device, 1)


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_full_7b_with_adams_moments_does_not_fit_one_h200_and_what_would_is_said():
    plan = planned(FULL_7B, read_target("", "h200:1", 1))
    assert not plan.fits
    # 7.63 billion in 4 + 4 + 2 + 4 bytes; kernels rounded, and the gradients of a micro-batch, in 2 each
    assert plan.footprints[0].total > 7.63e9 * 17.5
    assert verdict(plan).startswith("does not fit h200:1: needs 1")
    changes = {change.flags: change.total for change in plan.changes}
    assert changes["--lora.rank 16"] < changes["--optimizer.second-moment factored"] < 141e9
    text = "\n".join(lines(plan))
    assert "what would need less, by the estimate" in text
    assert "h200:2" in text
    assert as_json(plan)["fits"] is False


def test_flags_that_are_offered_need_less_and_are_none_that_are_set():
    greedy = dataclasses.replace(
        FULL_7B, compute=ComputeConfig(remat="none"), reference="online", optimizer=OptimizerConfig()
    )
    plan = planned(greedy, read_target("", "a100-40:8", 1))
    before = plan.needs
    names = [change.flags for change in plan.changes]
    assert all(change.total < before for change in plan.changes)
    assert names[:3] == ["--compute.remat projections", "--compute.remat attention", "--compute.remat full"]
    assert "--optimizer.first-moment bfloat16" in names
    assert "--reference stored" in names
    assert names[-1] == "all of these but adapters"
    assert plan.changes[-1].total == min(c.total for c in plan.changes if "lora" not in c.flags)
    plan = planned(FULL_7B, read_target("", "h200:1", 1))
    assert not any("remat" in change.flags or "first-moment" in change.flags for change in plan.changes)


def test_a_full_7b_fits_one_h200_and_half_a_billion_24_gb_with_what_is_left_open():
    """Full fine-tuning, fp32 parameters; how much is recomputed and how many groups share a micro-batch are chosen."""
    open_ = dataclasses.replace(FULL_7B, data=DataConfig())
    lean = OptimizerConfig(first_moment="bfloat16", second_moment="factored")
    plan = planned(dataclasses.replace(open_, optimizer=lean), read_target("", "h200:1", 1))
    assert plan.fits
    assert plan.recipe.compute.remat == "projections"
    half = make_plan(open_, read_target("", "rtx4090:1", 1), Choices(shape="0.5b", estimate=True), progress=print)
    assert half.fits
    assert half.recipe.compute.remat == "projections"
    assert half.loads[0].bucket.groups > 1


def test_changes_of_one_part_of_a_recipe_add_up():
    plan = planned(dataclasses.replace(FULL_7B, optimizer=OptimizerConfig()), read_target("", "h200:1", 1))
    changes = {change.flags: change.total for change in plan.changes}
    both = {name: plan.needs - total for name, total in changes.items() if name.startswith("--optimizer")}
    assert len(both) == 2
    assert plan.needs - changes["all of these but adapters"] >= 0.99 * sum(both.values())


def test_the_slots_offered_are_those_that_leave_one_group_a_device():
    plan = planned(FULL_7B, read_target("", "a100-40:4", 1))
    flags = next(change.flags for change in plan.changes if "slots" in change.flags)
    slots = int(flags.split()[1])
    fewer = dataclasses.replace(FULL_7B, data=DataConfig(slots_per_device=slots))
    again = planned(fewer, read_target("", "a100-40:4", 1))
    assert again.loads[0].bucket.groups == 4


def test_the_fewest_chips_named_hold_it_and_one_size_less_does_not():
    plan = planned(FULL_7B, read_target("", "h100:8", 1))
    found = {holder.target.chip.name: holder for holder in plan.smallest}
    assert found["h200"].target.total == 2
    assert found["v5p"].total <= found["v5p"].target.chip.memory
    each = plan.loads[0].bucket.groups // 8
    for holder in plan.smallest:
        sizes = [one.total for one in candidates(holder.target.chip)]
        below = sizes.index(holder.target.total) - 1
        if below < 0:
            continue
        mesh = shape_of_mesh(MeshConfig(), sizes[below])
        bucket = dataclasses.replace(plan.loads[0].bucket, groups=each * sizes[below])
        total = footprint(
            FULL_7B, SHAPES["7b"], bucket, mesh, responses=4, platform=holder.target.platform
        ).total  # fmt: skip
        assert total > holder.target.chip.memory


def test_what_the_compiler_says_goes_before_the_estimate():
    plan = planned(FULL_7B, read_target("v5p:2x2x2", "", 1))
    assert plan.fits
    bucket = plan.loads[0].bucket
    fine = CompiledBucket(bucket, Compiled(5 * GIB, 4 * GIB, 3 * GIB, 4 * GIB, 1.0), 1e15)
    there = dataclasses.replace(plan, compiled=(fine,))
    assert there.needs == 8 * GIB + plan.beside["accumulate"]
    assert there.fits
    large = CompiledBucket(bucket, TooLarge(101 * GIB, 95.74 * GIB, 1.0, "RESOURCE_EXHAUSTED: ..."), 1e15)
    there = dataclasses.replace(plan, compiled=(fine, large))
    assert not there.fits
    assert "does not compile: RESOURCE_EXHAUSTED" in "\n".join(lines(there))


def test_the_message_of_a_compiler_out_of_memory_is_read():
    message = "RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 20.31G of 15.75G hbm. Exceeded ..."
    needs, has = read_exhaustion(message)
    assert (needs / GIB, has / GIB) == (20.31, 15.75)
    message = "... the total memory required for HLO temporaries (400.00G) exceeds available HBM (15.75G)."
    needs, has = read_exhaustion(message)
    assert (needs / GIB, has / GIB) == (400, 15.75)
    assert read_exhaustion("RESOURCE_EXHAUSTED") == (0, 0)


def test_pairs_are_not_planned():
    recipe = dataclasses.replace(FULL_7B, data=DataConfig(pairing="pairs"))
    with pytest.raises(UsageError, match="pairs"):
        planned(recipe, read_target("", "h100:8", 1))


def test_seconds_and_shares_are_numbers():
    figures = as_json(planned(FULL_7B, read_target("", "h100:8", 1)))
    assert math.isfinite(figures["step"]["total"])
    assert 0 < figures["step"]["mfu"] < 1
