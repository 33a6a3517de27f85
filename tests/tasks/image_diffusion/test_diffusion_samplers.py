# SPDX-License-Identifier: Apache-2.0
"""Laws of sampling: exact solutions, orders of the solvers, guidance, independence of batch and order, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from moeapps.moe.presets import promoe
from tasks.image_diffusion.nets.ddpm import GaussianDiffusion
from tasks.image_diffusion.nets.flow import RectifiedFlow
from tasks.image_diffusion.nets.samplers import euler, guided, heun, image_noise, sample, time_grid
from tasks.image_diffusion.rivals import routers
from tests.tasks.image_diffusion.model_common import K, awake, net, noisy, task


def test_the_grid_runs_from_one_to_zero() -> None:
    for steps, shift in ((1, 1.0), (7, 1.0), (250, 3.0)):
        grid = time_grid(steps, shift)
        assert (grid[0], grid[-1], len(grid)) == (1.0, 0.0, steps + 1)
        assert (grid.diff() < 0).all()
    torch.testing.assert_close(time_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64))
    torch.testing.assert_close(time_grid(250)[:250], torch.linspace(1, 0, 251, dtype=torch.float64)[:250])


@pytest.mark.parametrize("solve", [euler, heun])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_field_of_a_single_image_leads_to_it_in_any_number_of_steps(solve, steps: int) -> None:
    x0, x = noisy().double(), noisy(seed=2).double()
    told = solve(lambda x_t, t: (x_t - x0) / t.view(-1, 1, 1, 1), x, time_grid(steps))
    torch.testing.assert_close(told, x0, atol=1e-9, rtol=1e-9)


def test_euler_is_of_first_and_heun_of_second_order() -> None:
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def error(solve, steps: int) -> float:
        return abs(float(solve(lambda y, t: -y, x, time_grid(steps))) - math.e)  # dy/dt = -y from 1 down to 0

    assert error(euler, 40) / error(euler, 80) == pytest.approx(2.0, rel=0.1)
    # The last step of Heun is Euler's: its error shrinks with the square of the step, too.
    assert error(heun, 40) / error(heun, 80) == pytest.approx(4.0, rel=0.1)


def test_guidance_of_one_is_conditional_of_zero_is_none_and_between_is_a_line() -> None:
    network = awake(net(promoe(num_experts=3), learn_sigma=True))
    x, time, label = noisy(), torch.tensor([10.0, 400.0, 700.0, 990.0]), torch.tensor([0, 2, 5, K])
    with torch.no_grad():
        given, without = network(x, time, label), network(x, time, torch.full((4,), K))
        torch.testing.assert_close(guided(network, x, time, label, 1.0), given)
        torch.testing.assert_close(guided(network, x, time, label, 0.0), without)
        told = guided(network, x, time, label, 3.0)
    expected = without + 3 * (given - without)
    torch.testing.assert_close(told[:, :1], expected[:, :1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(told[:, 1:], given[:, 1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(given[:3, :1], without[:3, :1])


@pytest.mark.parametrize(
    "moe",
    [
        promoe(num_experts=3),
        promoe(num_experts=3, by_expert=True),
        promoe(num_experts=3, conditional_split=False, router=routers.token_choice(num_experts=3)),
        promoe(num_experts=3, conditional_split=False, router=routers.dsmoe(num_experts=3)),
        promoe(num_experts=3, conditional_split=False, router=routers.diffmoe(num_experts=3)),
    ],
    ids=["promoe", "promoe_ec", "tc", "dsmoe", "diffmoe"],
)
def test_a_doubled_batch_is_two_passes_for_routers_that_look_at_their_own_image(moe) -> None:
    network = awake(net(moe))
    x, time, label, null = noisy(), torch.full((4,), 600.0), torch.arange(4), torch.full((4,), K)
    with torch.no_grad():
        both = network(torch.cat([x, x]), time.repeat(2), torch.cat([label, null]))
        torch.testing.assert_close(
            both, torch.cat([network(x, time, label), network(x, time, null)]), atol=1e-4, rtol=1e-4
        )


def test_noise_of_an_image_depends_on_seed_index_and_draw_alone() -> None:
    index = torch.tensor([5, 0, 17])
    noise = image_noise(3, index, (1, 4, 4))
    assert torch.equal(image_noise(3, index[[2, 0]], (1, 4, 4)), noise[[2, 0]])
    others = [image_noise(4, index, (1, 4, 4)), image_noise(3, index, (1, 4, 4), draw=1)]
    assert all(not torch.isclose(other, noise).any() for other in others)
    many = image_noise(0, torch.arange(2000), (4,))
    assert len(set(many[:, 0].tolist())) == 2000
    assert abs(float(many.mean())) < 0.05
    assert float(many.std()) == pytest.approx(1.0, abs=0.05)
    assert abs(float(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1])) < 0.08


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "ancestral"])
def test_samples_depend_on_seed_label_and_index_and_not_on_the_batch(solver: str) -> None:
    diffusion = solver in ("ddim", "ancestral")
    model = task(sizes={"learn_sigma": diffusion}, process=GaussianDiffusion(beta_last=0.002) if diffusion else None)
    awake(model.net)
    model.train()
    how = {"cfg": 2.0, "steps": 3, "seed": 7, "solver": solver}
    label = torch.tensor([0, 3, 5, 3, K, 1])
    images = sample(model, label, **how)
    assert images.shape == (6, 1, 8, 8)
    assert images.abs().max() <= 1
    assert model.training
    for size in (1, 4):
        torch.testing.assert_close(sample(model, label, batch_size=size, **how), images, atol=1e-4, rtol=1e-4)
    order = torch.tensor([4, 1, 0])
    torch.testing.assert_close(sample(model, label[order], index=order, **how), images[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(model, label, **how), images, atol=0, rtol=0)
    assert not torch.allclose(sample(model, label, **{**how, "seed": 8}), images, atol=0.05)
    assert not torch.allclose(images[1], images[3], atol=0.05)  # one class, other noise


def test_a_flow_is_sampled_like_the_loop_in_the_paper() -> None:
    network = awake(net(promoe(num_experts=3), learn_sigma=True))
    label, x = torch.arange(4), image_noise(5, torch.arange(4), (1, 8, 8))
    sigma = torch.linspace(1, 0, 11)
    with torch.no_grad():
        for now, then in pairwise(sigma):
            time = (1000 * now).expand(4)
            given, none = network(x, time, label)[:, :1], network(x, time, torch.full((4,), K))[:, :1]
            x = x + (then - now) * (none + 1.5 * (given - none))
    told = sample(network, label, cfg=1.5, steps=10, seed=5, solver="euler", clip=False)
    torch.testing.assert_close(told, x, atol=1e-3, rtol=1e-3)


def test_latents_are_not_clipped_and_pixels_are() -> None:
    model = task()
    awake(model.net)
    label = torch.arange(K)
    assert sample(model, label, steps=2).abs().max() == 1
    model.facts["latent"] = True
    assert sample(model, label, steps=2).abs().max() > 1


def test_sampling_nothing_gives_nothing() -> None:
    assert sample(task(), torch.empty(0, dtype=torch.int64), steps=1).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, K + 1], {}, f"no class {K + 1}: the model knows classes 0 to {K - 1}"),
        ([-1], {}, "no class -1"),
        ([0], {"cfg": -0.5}, "cfg=-0.5"),
        ([0], {"cfg": float("nan")}, "cfg=nan"),
        ([0], {"steps": 0}, "steps=0"),
        ([0], {"solver": "ddim"}, "a RectifiedFlow has euler, heun"),
        ([0], {"process": GaussianDiffusion(), "solver": "euler"}, "a GaussianDiffusion has ddim, ancestral"),
    ],
)
def test_bad_input_is_refused(labels: list[int], options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(task(), torch.tensor(labels), **options)
    assert RectifiedFlow().default_solver in RectifiedFlow.solvers


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="give int64"):
        sample(task(), torch.tensor([0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_any_precision_is_told_exact_times(dtype: torch.dtype) -> None:
    """Bfloat16 would round 999 to 1000 and 857 to 856: other times than those of training."""
    network, told = net(promoe(num_experts=3), learn_sigma=True).to(dtype).eval(), []
    network.time.register_forward_pre_hook(lambda _, inputs: told.append(float(inputs[0][0])))

    sample(network, torch.tensor([1]), steps=7, solver="euler")
    assert told == pytest.approx([1000 * (1 - i / 7) for i in range(7)], rel=1e-6)
    told.clear()
    sample(network, torch.tensor([1]), steps=7, solver="ddim", process=GaussianDiffusion())
    assert told == [round(999 * (6 - i) / 6) for i in range(7)]
