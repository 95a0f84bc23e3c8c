"""Memory: what is kept, what is computed again, and that neither changes a gradient."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from test_objectives import gradient

from diffusers_ctrl import CTRLConfig, adjoints, objectives, paths, policy
from diffusers_ctrl.evaluation import draw_samples
from diffusers_ctrl.objectives import adjoint_matching, direct_backprop, policy_gradient
from diffusers_ctrl.paths import backwards, walk
from diffusers_ctrl.randomness import TrajectoryNoise, standard_normal
from diffusers_ctrl.rollouts import Sampler, in_chunks, rollout
from problems import tiny_environment, tiny_policy


BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"


class LearnedVariance(torch.nn.Module):
    """A denoiser that also predicts variances, of an ordinary one."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *args, **kwargs):
        output = self.unet(*args, **kwargs).sample
        return torch.cat([output, output.flip(1).tanh()], dim=1)


@pytest.mark.parametrize("truncation", [None, 3])
@pytest.mark.parametrize("merged", [False, True])
def test_steps_that_are_computed_again_have_the_gradient_of_those_that_are_kept(truncation, merged):
    environment, kept, again = tiny_environment(), tiny_policy(2.0, 0.1), tiny_policy(2.0, 0.1, checkpointing=True)
    with kept.merged(merged), again.merged(merged):
        expected = gradient(direct_backprop, kept, environment, truncation=truncation)
        found = gradient(direct_backprop, again, environment, truncation=truncation)
    assert expected.norm() > 0.1
    assert (found - expected).norm() / expected.norm() < 1e-12


def test_the_gradient_through_a_learned_variance(monkeypatch):
    """There the noise of a step matters too; it is read off the states."""
    environment = replace(tiny_environment(), sampler=Sampler(DDPMScheduler(variance_type="learned_range", clip_sample=False), 4))
    found = []
    for checkpointing in (False, True):
        tuned = tiny_policy(perturb=0.1, checkpointing=checkpointing)
        tuned.denoiser = LearnedVariance(tuned.denoiser)
        found.append(gradient(direct_backprop, tuned, environment))
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-9


@pytest.mark.parametrize("objective", [direct_backprop, adjoint_matching])
@pytest.mark.parametrize("generator", ["torch", "trajectories", None])
def test_states_that_are_computed_again_are_the_same_bit_for_bit(objective, generator, monkeypatch):
    tuned, environment = tiny_policy(perturb=0.1, checkpointing=True), tiny_environment(steps=8)
    batch = environment.draw(3, torch.Generator().manual_seed(0))

    def make():
        return TrajectoryNoise([1, 2, 3]) if generator == "trajectories" else torch.Generator().manual_seed(1)

    source = make() if generator else None
    path = walk(tuned, environment.sampler, batch, source, kept=3)
    assert [len(span) for span in path.spans] == [3, 3, 2] and len(path.states) == 3
    steps = list(backwards(tuned, environment.sampler, batch, path))
    assert [k for k, *_ in steps] == list(range(8))[::-1]
    assert torch.equal(steps[0][2], path.sample) and torch.equal(steps[-1][1], batch.noise)
    assert all(torch.equal(later[1], earlier[2]) for later, earlier in zip(steps[:-1], steps[1:], strict=True))
    if generator:
        whole = rollout(tuned, environment.sampler, batch, make(), reference=False)
        assert all(torch.equal(x, whole.states[k]) for k, x, _ in steps)
        # and whatever comes next from the generator is what it would have been
        other, device = make(), torch.device("cpu")
        rollout(tuned, environment.sampler, batch, other, reference=False)
        assert torch.equal(*(standard_normal((3, 2, 4, 4), own, device, torch.float64) for own in (source, other)))
    expected = gradient(objective, tuned, environment)
    for module in (objectives, adjoints):
        monkeypatch.setattr(module, "walk", lambda *args, **kwargs: walk(*args, kept=3, **kwargs))
    assert torch.equal(gradient(objective, tuned, environment), expected)


@pytest.mark.parametrize("taken", [0, 1, 31, 32, 40])
def test_a_copy_of_trajectories_noise_goes_on_with_the_same_numbers_and_keeps_none(taken):
    source = TrajectoryNoise([3, 5])
    for _ in range(taken):
        source.normal((2, 4), torch.float64)
    twin = source.copy().copy()
    assert not twin._ahead
    shapes = [(2, 4)] * 35 + [(2, 3)] * 2
    for shape in shapes:
        assert torch.equal(source.normal(shape, torch.float64), twin.normal(shape, torch.float64))


def test_a_thousand_steps_keep_no_more_than_64_states(monkeypatch):
    environment = tiny_environment()
    sampler = Sampler(environment.sampler.scheduler, 1000, {"eta": 1.0})
    monkeypatch.setattr(paths, "rollout", lambda *args, **kwargs: rollout(*args, **{**kwargs, "span": range(0)}))  # goes nowhere
    path = walk(tiny_policy(), sampler, environment.draw(2, None), torch.Generator())
    assert len(path.states) <= 64 and max(map(len, path.spans)) == 16
    assert [k for span in path.spans for k in span] == list(range(1000))


class Kept:
    """Counts the bytes that autograd keeps for backward, now and at most."""

    def __enter__(self):
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        held, size = type("Held", (), {})(), tensor.numel() * tensor.element_size()
        held.tensor = tensor
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self.free, size)
        return held

    def free(self, size):
        self.now -= size


def peak(objective, steps, **settings) -> int:
    tuned = tiny_policy(perturb=0.1, **settings)
    environment = tiny_environment(steps=steps)
    with Kept() as kept:
        gradient(objective, tuned, environment)
    return kept.peak


@pytest.mark.parametrize(
    ("objective", "settings", "grows"),
    [
        (direct_backprop, {}, True),
        (direct_backprop, {"checkpointing": True}, False),
        (adjoint_matching, {}, False),
        (policy_gradient, {}, False),
    ],
)
def test_the_activations_that_are_kept_do_not_grow_with_the_number_of_steps(objective, settings, grows):
    few, many = (peak(objective, steps, **settings) for steps in (4, 10))
    assert few > 50_000
    assert many > 2 * few if grows else many < 1.05 * few


def calls(run, monkeypatch) -> dict[str, int]:
    """How often `run(policy)` calls the denoiser with and without a graph, and how often anything is checkpointed."""
    count = {"graph": 0, "no graph": 0, "checkpoints": 0}
    tuned = tiny_policy(perturb=0.1, checkpointing=True)
    tuned.denoiser.enable_gradient_checkpointing()
    denoise, checkpoint = tuned._denoise, policy.checkpoint

    def counted(args, *rest):
        output = denoise(args, *rest)
        count["graph" if output.requires_grad else "no graph"] += 1
        return output

    def counted_checkpoint(*args, **kwargs):
        count["checkpoints"] += 1
        return checkpoint(*args, **kwargs)

    tuned._denoise = counted
    monkeypatch.setattr(policy, "checkpoint", counted_checkpoint)
    run(tuned)
    return count


def test_nothing_is_checkpointed_where_no_gradient_flows(monkeypatch):
    """With every kind of checkpointing on. K = 5 steps, of which the last has no noise: 4 calls are tuned."""
    environment = tiny_environment()
    batch = environment.draw(2, torch.Generator().manual_seed(0))
    sampling = calls(lambda tuned: draw_samples(tuned, environment, 2, progress=False), monkeypatch)
    assert sampling["graph"] == sampling["checkpoints"] == 0 and sampling["no graph"] > 0
    reference = calls(lambda tuned: tuned.reference(batch.noise, 500, batch.prompt_embeds), monkeypatch)
    assert reference == {"graph": 0, "no graph": 1, "checkpoints": 0}
    blocks = (
        calls(lambda tuned: tuned(batch.noise.clone().requires_grad_(), 500, batch.labels, 1.0, batch.prompt_embeds), monkeypatch)[
            "checkpoints"
        ]
        - 1
    )  # the blocks of one call; the one more is the call itself

    # sampling: 5 without a graph. Backwards: the base at 4 steps with one, at the first step without; the tuned model at 4
    adjoint = calls(lambda tuned: gradient(adjoint_matching, tuned, environment), monkeypatch)
    assert adjoint == {"graph": 8, "no graph": 6, "checkpoints": 8 * blocks}
    # the way back ends at the earliest step that is regressed on: the base at the last step and, without a graph, at this one
    late = calls(lambda tuned: gradient(adjoint_matching, tuned, environment, steps=[3]), monkeypatch)
    assert late == {"graph": 2, "no graph": 6, "checkpoints": 2 * blocks}
    direct = calls(lambda tuned: gradient(direct_backprop, tuned, environment), monkeypatch)
    assert direct == {"graph": 8, "no graph": 6, "checkpoints": 8 * blocks}
    # sampling with both models, then the tuned one at 4 steps
    ppo = calls(lambda tuned: gradient(policy_gradient, tuned, environment), monkeypatch)
    assert ppo == {"graph": 4, "no graph": 9, "checkpoints": 4 * blocks}


def test_of_a_long_trajectory_only_the_states_that_a_coarse_adjoint_needs_are_kept_and_none_is_computed_again(monkeypatch):
    environment, tuned = tiny_environment(steps=100), tiny_policy(perturb=0.1)
    few = calls(lambda policy: gradient(adjoint_matching, policy, environment, steps=[10, 50, 80], coarse=True), monkeypatch)
    assert few["graph"] == 6  # the adjoint at three states, and the tuned model at three
    assert few["no graph"] == 103  # sampling, and the base at the three steps
    # more than are kept: every second state, the others computed again, and the same gradient
    environment = tiny_environment(steps=40)
    expected = gradient(adjoint_matching, tuned, environment, steps=list(range(0, 39, 3)), coarse=True)
    monkeypatch.setattr(adjoints, "walk", lambda *args, **kwargs: walk(*args, kept=20, **kwargs))
    torch.testing.assert_close(
        gradient(adjoint_matching, tuned, environment, steps=list(range(0, 39, 3)), coarse=True), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_gradient_of_kept_graphs(dtype):
    """bfloat16 takes gradients step by step; float16, which scales the loss, keeps to checkpointed calls, whose factor reaches all of it."""
    environment = tiny_environment()
    reward = environment.reward
    environment = replace(
        environment,
        reward=lambda x, labels: reward(x.double(), labels).float(),
        prompt_embeds=environment.prompt_embeds.float(),
        null_embeds=environment.null_embeds.float(),
    )
    for objective in (direct_backprop, adjoint_matching):
        found = []
        for checkpointing, scale in ((False, 1.0), (True, 1.0), (True, 2.0**6)):
            tuned = tiny_policy(perturb=0.1, checkpointing=checkpointing).float()
            generator = torch.Generator().manual_seed(3)
            with torch.autocast("cpu", dtype=dtype):
                batch = environment.draw(6, generator)
                loss, _ = objective(tuned, environment.sampler, batch, environment.log_likelihood, generator)
            (loss * scale).backward()
            groups = tuned.trainable_parameters().values()
            found.append(torch.cat([p.grad.flatten() for group in groups for p in group]) / scale)
        for other in found[1:]:
            assert (other - found[0]).norm() / found[0].norm() < 0.02


# -- the reward in chunks --


@pytest.mark.parametrize("objective, checkpointing", [(direct_backprop, False), (direct_backprop, True), (adjoint_matching, False)])
def test_a_reward_in_chunks_has_the_same_gradient(objective, checkpointing):
    environment, tuned = tiny_environment(), tiny_policy(perturb=0.1, checkpointing=checkpointing)
    sizes = []

    def decode(x):
        sizes.append(len(x))
        return x.tanh()

    environment = replace(environment, decode=decode)
    whole = gradient(objective, tuned, environment)
    assert sizes == [6]
    sizes.clear()
    parts = gradient(objective, tuned, replace(environment, reward_batch_size=4))
    assert set(sizes) == {4, 2}
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_chunks_without_a_gradient_are_called_once():
    seen = []
    double = in_chunks(lambda x: (seen.append(len(x)), 2 * x)[1], 3)
    x = torch.arange(8.0)
    assert torch.equal(double(x), 2 * x) and seen == [3, 3, 2]
    assert in_chunks(double, None) is double
    with pytest.raises(ValueError, match="reward_batch_size must be at least 1, got 0"):
        CTRLConfig(reward_batch_size=0)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "checkpointing"), [("direct_backprop", True), ("adjoint_matching", False)])
def test_peak_memory_at_a_hundred_steps_is_within_a_fifth_of_that_at_ten(objective, checkpointing):
    """The benchmark's rows, in processes of their own; K = 1,000 is in benchmarks/results/memory.json."""
    found = []
    for steps in (10, 100):
        row = {"steps": steps, "objective": objective, "checkpointing": checkpointing, "decode": False}
        row |= {"micro_batches": 1, "reward_batch_size": None}
        command = f"import sys; sys.path.insert(0, {str(BENCHMARK.parent)!r}); import json, memory; print(json.dumps(memory.in_fresh_process(**{row!r})))"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1])["peak_mib"])
    assert found[1] <= 1.2 * found[0]
