from pathlib import Path

import pytest
from PIL import Image

from avalanche_memo.benchmarks import class_order, split_image_folder


def make_folder(root: Path, part: str, names: list[str], images: int) -> None:
    """Write images whose grey level is 50 times the place of their class among the names."""
    for level, name in enumerate(names):
        (root / part / name).mkdir(parents=True)
        for index in range(images):
            Image.new("L", (20, 16), 50 * level).save(root / part / name / f"{index}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path, "train", ["ant", "bee", "cow", "dog"], 3)
    make_folder(tmp_path, "val", ["ant", "bee", "cow", "dog"], 2)
    return tmp_path


def test_classes_follow_the_order(folder):
    benchmark = split_image_folder(folder, 2, 1, image_size=8)
    order = class_order(4, 1993)
    for stream, sizes in ((benchmark.train_stream, [6, 3, 3]), (benchmark.test_stream, [4, 2, 2])):
        assert [len(experience.dataset) for experience in stream] == sizes
        for experience in stream:
            for image, label, _ in experience.dataset:
                assert image.shape == (3, 8, 8)
                level = (image[0] * 0.229 + 0.485) * 255
                assert level.mean().item() == pytest.approx(50 * order[label], abs=0.01)


def test_missing_folder_says_the_layout(tmp_path):
    message = "train/<class>/<image> and val/<class>/<image>, got no"
    with pytest.raises(FileNotFoundError, match=f"{message} train/"):
        split_image_folder(tmp_path, 0, 1)
    make_folder(tmp_path, "train", ["ant"], 1)
    with pytest.raises(FileNotFoundError, match=f"{message} val/"):
        split_image_folder(tmp_path, 0, 1)


def test_both_parts_must_have_the_same_classes(tmp_path):
    make_folder(tmp_path, "train", ["ant", "bee"], 1)
    make_folder(tmp_path, "val", ["ant", "cow"], 1)
    with pytest.raises(ValueError, match=r"same class folders.*only one of them: bee, cow"):
        split_image_folder(tmp_path, 0, 1)


def test_imagenet_mini(imagenet_mini_root):
    benchmark = split_image_folder(imagenet_mini_root, 50, 10, image_size=64)
    assert [len(e.classes_in_this_experience) for e in benchmark.train_stream] == [50] + [10] * 5
    classes = sorted(path.name for path in (imagenet_mini_root / "val").iterdir())
    # The first class of the published order has id 68.
    expected = len(list((imagenet_mini_root / "val" / classes[68]).iterdir()))
    test = benchmark.test_stream[0].dataset
    assert list(test.targets).count(0) == expected
    assert test[0][0].shape == benchmark.train_stream[0].dataset[0][0].shape == (3, 64, 64)
