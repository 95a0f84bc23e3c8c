"""The JPEG scorer: a distribution over the classes, by the real file size, whose best class is the oracle's."""

import io

import pytest
import torch
from PIL import Image

import jpeg_data
from jpeg_data import (
    BINARY_CLASSES,
    DIGIT_THRESHOLDS,
    JPEG_CLASSES,
    digit_jpeg_class,
    digit_jpeg_score,
    jpeg_binary_class,
    jpeg_class,
    jpeg_kilobytes,
)


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


# -- the paper's classes --


def paper_class(score: float) -> int:
    """Four classes as arXiv 2406.12120 has them, score = -kilobytes."""
    if score < -110:
        return 0
    if score < -85:
        return 1
    if score < -60:
        return 2
    return 3


def large_pictures() -> torch.Tensor:
    """(n, 3, 512, 512), from flat to noisy: files of 5 to about 150 kilobytes."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(1, 3, 512, 512, generator=generator) - 0.5
    return (0.5 + torch.linspace(0, 0.13, 14)[:, None, None, None] * noise).clamp(0, 1)


def test_the_papers_classes_of_real_files():
    images = large_pictures()
    scores = (-jpeg_kilobytes(images)).tolist()
    assert jpeg_class(images).tolist() == [paper_class(score) for score in scores]
    assert set(jpeg_class(images).tolist()) == {0, 1, 2, 3}
    assert jpeg_binary_class(images).tolist() == [int(score >= -70) for score in scores]
    # the names say what the classes are: from the largest file to the smallest, from low compressibility to high
    assert JPEG_CLASSES == ("largest", "large", "small", "smallest") and BINARY_CLASSES == ("low", "high")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert jpeg_class(images)[order].tolist() == sorted(jpeg_class(images).tolist(), reverse=True)


@pytest.mark.parametrize(
    "kilobytes, four, two",
    [(110.001, 0, 0), (110.0, 1, 0), (85.001, 1, 0), (85.0, 2, 0), (70.001, 2, 0), (70.0, 2, 1), (60.001, 2, 1), (60.0, 3, 1)],
)
def test_the_thresholds_belong_to_the_class_above(monkeypatch, kilobytes, four, two):
    """Files of exactly these sizes cannot be drawn, so the measurement is given."""
    monkeypatch.setattr(jpeg_data, "jpeg_kilobytes", lambda images: torch.tensor([kilobytes], dtype=torch.float64))
    image = torch.zeros(1, 3, 512, 512)
    assert jpeg_class(image).tolist() == [four] == [paper_class(-kilobytes)] and jpeg_binary_class(image).tolist() == [two]


def test_other_sizes_are_refused():
    for function in (jpeg_class, jpeg_binary_class):
        with pytest.raises(ValueError, match="512x512 images, got 32x32"):
            function(pictures(2))
