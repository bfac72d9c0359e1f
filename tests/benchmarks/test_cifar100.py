import pickle

import pytest
import torch

from avalanche_memo.benchmarks import split_cifar100

MEAN = torch.tensor([0.5071, 0.4867, 0.4408])[:, None, None]
STD = torch.tensor([0.2675, 0.2565, 0.2761])[:, None, None]


def test_base50_inc10(cifar100_root):
    benchmark = split_cifar100(50, 10, root=cifar100_root)
    train = [len(experience.dataset) for experience in benchmark.train_stream]
    assert train == [25_000] + [5_000] * 5
    assert [len(experience.dataset) for experience in benchmark.test_stream] == [5_000] + [
        1_000
    ] * 5
    assert set(benchmark.test_stream[5].dataset.targets) == set(range(90, 100))

    with (cifar100_root / "cifar-100-python" / "test").open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    with (cifar100_root / "cifar-100-python" / "meta").open("rb") as file:
        names = pickle.load(file, encoding="latin1")["fine_label_names"]
    # The first classes that the published order shows: ids 68, 56, 78.
    test = benchmark.test_stream[0].dataset
    for label, name in enumerate(["road", "palm_tree", "snake"]):
        index = raw["fine_labels"].index(names.index(name))
        pixels = torch.from_numpy(raw["data"][index].reshape(3, 32, 32))
        image, _, task = test[list(test.targets).index(label)]
        torch.testing.assert_close(image, (pixels / 255 - MEAN) / STD)
        assert task == 0


def test_small_versions(cifar100_root, monkeypatch):
    monkeypatch.setenv("AVALANCHE_MEMO_DATA", str(cifar100_root))
    benchmark = split_cifar100(0, 2, classes=4, samples_per_class=3, original_class_ids=True)
    for stream in (benchmark.train_stream, benchmark.test_stream):
        targets = [sorted(experience.dataset.targets) for experience in stream]
        assert targets == [[56] * 3 + [68] * 3, [8] * 3 + [78] * 3]
    image, label, _ = benchmark.train_stream[0].dataset[0]
    assert image.shape == (3, 32, 32)
    assert label in (56, 68)


def test_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("AVALANCHE_MEMO_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"root: .*set AVALANCHE_MEMO_DATA"):
        split_cifar100()
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python.*download=True"):
        split_cifar100(root=tmp_path)


def test_corrupt_data_set_says_how_to_get_it(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"not a pickle")
    with pytest.raises(RuntimeError, match=r"incomplete or corrupt; delete it.*download=True"):
        split_cifar100(root=tmp_path)


def test_samples_per_class_is_checked(cifar100_root):
    with pytest.raises(ValueError, match="samples_per_class: expected a positive number, got 0"):
        split_cifar100(root=cifar100_root, samples_per_class=0)
