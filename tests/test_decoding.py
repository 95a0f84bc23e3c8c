"""Decoding against the pipelines' own images, on real tiny ones of every family."""

import pytest
import torch

from diffusers_ctrl.bases import call_arguments
from diffusers_ctrl.decoding import decoder, round_trip
from diffusers_ctrl.replay import replay
from families import BUILDERS, build


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepared(name, dtype=torch.float32):
    family = build(name)
    family.pipe.scheduler = family.noisy
    family.pipe.to(dtype)
    arguments = {key: value for key, value in family.call.items() if key not in (family.samples, "guidance_scale")}
    return family, arguments


def final_states(family):
    """The states that a plain call of the pipeline ends on, and its images, for its two samples."""
    seen, scheduler, step = [], family.pipe.scheduler, family.pipe.scheduler.step

    def watching(*args, **kwargs):
        result = step(*args, **kwargs)
        seen.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    watching.__wrapped__ = step
    scheduler.step = watching
    images = family.pipe(**family.call, num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt")[0]
    del scheduler.step
    return seen[-1], images


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_images_are_the_pipeline_s_own_bit_for_bit(name, dtype):
    family, arguments = prepared(name, DTYPES[dtype])
    decode = decoder(family.pipe, **arguments)
    states, images = final_states(family)
    assert states.shape[1:] == decode.shape and images.shape[1:] == decode.image_shape
    with torch.no_grad():
        found = decode(states)
    assert torch.equal(found, images)
    assert 0 <= found.min() < found.max() <= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_decoding_has_a_gradient_and_it_is_right(name):
    family, arguments = prepared(name, torch.float64)
    decode = decoder(family.pipe, **arguments)
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(2, *decode.shape, generator=generator, dtype=torch.float64) * 0.1 for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(2, *decode.image_shape, generator=generator, dtype=torch.float64)

    def value(states):
        return (weight * decode(states)).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    step = 1e-4  # some norms are taken in float32 whatever the dtype
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-4)
    assert slope.abs() > 1e-3


def test_scales_a_channel_are_measured_where_nothing_is_written():
    family, arguments = prepared("stable_diffusion_xl")
    family.pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    decode = decoder(family.pipe, **arguments)
    states, images = final_states(family)
    with torch.no_grad():
        torch.testing.assert_close(decode(states), images, rtol=1e-4, atol=1e-5)


def test_an_autoencoder_that_the_pipeline_widens_is_widened_here_and_left_alone_there():
    family, arguments = prepared("stable_diffusion_xl", torch.float16)
    assert family.pipe.vae.config.force_upcast
    decode = decoder(family.pipe, **arguments)
    assert decode.autoencoder.dtype == torch.float32 and family.pipe.vae.dtype == torch.float16
    states, images = final_states(family)
    with torch.no_grad():
        torch.testing.assert_close(decode(states), images, rtol=1e-2, atol=1e-2)


def test_a_size_that_is_not_the_native_one():
    family, arguments = prepared("flux")
    decode = decoder(family.pipe, **arguments | {"height": 24, "width": 16})
    assert (decode.shape, decode.image_shape) == ((24, 16), (3, 24, 16))


def test_a_pipeline_with_more_than_an_affine_map_is_refused():
    family, arguments = prepared("flux")

    def squashed(latents, *args):
        return torch.tanh(type(family.pipe)._unpack_latents(latents, *args))

    family.pipe._unpack_latents = squashed
    with pytest.raises(ValueError, match="FluxPipeline does more to its states"):
        decoder(family.pipe, **arguments)


def test_images_that_are_finished_in_another_way_are_refused():
    family, arguments = prepared("stable_diffusion")
    postprocess = family.pipe.image_processor.postprocess
    family.pipe.image_processor.postprocess = lambda image, **kwargs: 1 - postprocess(image, **kwargs)
    with pytest.raises(ValueError, match="StableDiffusionPipeline finishes its images in a way of its own"):
        decoder(family.pipe, **arguments)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_round_trip_is_the_autoencoder_s(name):
    family, arguments = prepared(name)
    images = torch.rand(3, *decoder(family.pipe, **arguments).image_shape, generator=torch.Generator().manual_seed(0))
    found = round_trip(family.pipe, images, batch_size=2)
    assert found.shape == images.shape and 0 <= found.min() and found.max() <= 1
    if name == "ddpm":
        assert torch.equal(found, images)
        return
    vae = family.pipe.vae
    with torch.no_grad():
        encoded = vae.encode(images * 2 - 1)
        latents = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_told_apart_in_a_replay_is_nothing():
    """The chosen final state is what the pipeline decodes, whatever its denoiser says."""
    family, arguments = prepared("dit")
    state = torch.randn(1, 4, 8, 8)
    for scale in (1.0, 3.0):
        seen = replay(family.pipe, call_arguments(family.pipe, [7], 2, scale, arguments), final=state)
        torch.testing.assert_close(seen.decode.latents, state / family.pipe.vae.config.scaling_factor)
