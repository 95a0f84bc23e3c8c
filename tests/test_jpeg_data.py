"""The JPEG scorer: a distribution over the classes, by the real file size, whose best class is the oracle's."""

import io

import torch
from PIL import Image

from jpeg_data import DIGIT_THRESHOLDS, digit_jpeg_class, digit_jpeg_score, jpeg_kilobytes


def pictures(n: int = 60) -> torch.Tensor:
    """(n, 3, 32, 32), from flat to noisy, so that the files' sizes run over all classes."""
    generator = torch.Generator().manual_seed(0)
    amount = torch.linspace(0, 0.35, n)[:, None, None, None]
    return (0.5 + amount * (torch.rand(n, 1, 32, 32, generator=generator) - 0.5)).expand(-1, 3, -1, -1)


def test_the_size_is_that_of_the_file():
    images = pictures(3)
    for image, size in zip(images, jpeg_kilobytes(images).tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=95)
        assert size == len(buffer.getvalue()) / 1000


def test_the_score_is_a_distribution_whose_mode_is_the_class():
    images = pictures()
    classes = digit_jpeg_class(images)
    assert set(classes.tolist()) == {0, 1, 2}
    scores = torch.stack([digit_jpeg_score(images, torch.full((len(images), 1), float(y))) for y in range(3)], dim=1)
    assert scores.isfinite().all() and scores.shape == (len(images), 3)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(images)))
    size, (low, high) = jpeg_kilobytes(images), DIGIT_THRESHOLDS
    clear = torch.minimum((size - low).abs(), (size - high).abs()) > 0.005
    assert clear.sum() > 20 and torch.equal(scores.argmax(1)[clear], classes[clear])
