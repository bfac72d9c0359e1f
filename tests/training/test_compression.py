import io
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training import Naive
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

from avalanche_memo.models import ExpandableNetwork
from avalanche_memo.training import MEMO, Compression, Replay
from avalanche_memo.training.compression import lowest_quality, through_codec
from avalanche_memo.training.loading import resident_loader
from avalanche_memo.training.plugins import HerdingReplayPlugin, ResidentBatches
from avalanche_memo.training.samples import original_image, with_images
from avalanche_memo.training.storage_policy import HerdingBuffer
from tests.helpers import silent, tiny_backbone
from tests.reference.herding import herding, unit

RAW = 3 * 24 * 24
AUGMENT = T.Compose([T.RandomCrop(24, padding=2), T.RandomHorizontalFlip(), T.ToTensor()])


class Photos:
    """Smooth colour images of some pixels: something that the codecs can shorten."""

    def __init__(self, per_class=12, classes=6, mode="RGB", side=24):
        coarse = np.random.default_rng(0).integers(0, 256, (per_class * classes, 4, 4, 3))
        self.images = [
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).convert(mode)
            for pixels in coarse.astype(np.uint8)
        ]
        self.targets = list(range(classes)) * per_class

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def stream_of(api="nc", photos=None, experiences=3, transform=AUGMENT):
    photos = photos or Photos()
    order = [4, 1, 5, 0, 3, 2]
    if api.startswith("nc"):
        return nc_benchmark(
            photos,
            photos,
            experiences,
            task_labels=api == "nc with task labels",
            fixed_class_order=order,
            class_ids_from_zero_from_first_exp=api == "nc relabelled",
            train_transform=transform,
            eval_transform=T.ToTensor(),
        ).train_stream
    dataset = as_classification_dataset(
        photos, transform_groups={"train": (transform, None), "eval": (T.ToTensor(), None)}
    )
    return class_incremental_benchmark(
        {"train": dataset, "test": dataset}, class_order=order, num_experiences=experiences
    ).train_stream


class Pixels(nn.Module):
    def extract_features(self, x):
        return x.flatten(1)


AGENT = SimpleNamespace(model=Pixels(), device=torch.device("cpu"))


def file_of(image, codec, quality):
    """What Pillow writes, told once more."""
    options = {"jpeg": {"optimize": True}, "webp": {"method": 6}}[codec]
    file = io.BytesIO()
    image.save(file, codec.upper(), quality=quality, **options)
    return file.getvalue()


def decoded(file, mode="RGB"):
    return T.functional.to_tensor(Image.open(io.BytesIO(file)).convert(mode))


def originals(experience, c):
    indices = [i for i, y in enumerate(experience.dataset.targets) if y == c]
    return [original_image(experience.dataset, i) for i in indices]


# --- the memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "quality"), [("jpeg", 60), ("webp", 80)])
def test_a_class_holds_the_files_that_fit_into_the_bytes_of_its_raw_images(codec, quality):
    buffer = HerdingBuffer(6, compression=Compression(codec, quality))
    first, second = stream_of()[:2]
    buffer.post_adapt(AGENT, first)
    buffer.post_adapt(AGENT, second)
    held = {c: [x for x, y, *_ in buffer.buffer.eval() if y == c] for c in buffer.order}
    total = 0
    for experience in (first, second):
        for c in experience.classes_in_this_experience:
            images = originals(experience, c)
            features = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image in images])
            order = herding(unit(features), len(images))
            files = [file_of(images[i], codec, quality) for i in order]
            sizes = np.cumsum([len(file) for file in files])
            fits = int((sizes <= 6 // 4 * RAW).sum())
            assert 6 // 4 < fits < len(images)
            total += sizes[fits - 1]
            expected = [decoded(file) for file in files[:fits]]
            assert Counter(map(key, held[c])) == Counter(map(key, expected))
    assert buffer.exemplar_bytes == total


def key(image):
    return hash((image * 255).round().byte().numpy().tobytes())


def test_a_memory_that_shrinks_keeps_the_best_files():
    buffer = HerdingBuffer(16, compression=Compression("webp", 40))
    for experience in stream_of():
        before = {c: [buffer._files[tuple(r)] for r in o.tolist()] for c, o in buffer.order.items()}
        buffer.post_adapt(AGENT, experience)
        for c, files in before.items():
            after = [buffer._files[tuple(row)] for row in buffer.order[c].tolist()]
            assert 0 < len(after) <= len(files)
            assert after == files[: len(after)]
        held = sum(len(order) for order in buffer.order.values())
        assert held == len(buffer._files) == len(buffer.buffer)
        assert buffer.exemplar_bytes <= 16 * RAW


def test_an_old_class_is_herded_anew_from_its_files_alone(monkeypatch):
    buffer = HerdingBuffer(6, rerank=True, compression=Compression("jpeg", 30))
    stream = stream_of()
    buffer.post_adapt(AGENT, stream[0])
    files = dict(buffer._files)
    seen = []
    encode = Compression.encode
    monkeypatch.setattr(
        Compression, "encode", lambda *a, **k: (seen.append(a[1]), encode(*a, **k))[1]
    )
    herded = []

    class Watched(Pixels):
        def extract_features(self, x):
            herded.extend(map(key, x))
            return super().extract_features(x)

    buffer.post_adapt(SimpleNamespace(model=Watched(), device=AGENT.device), stream[1])
    assert files.items() >= {r: f for r, f in buffer._files.items() if r[0] == 0}.items()
    old, new = (
        {key(T.functional.to_tensor(image)) for image in originals_of(e)} for e in stream[:2]
    )
    assert {key(T.functional.to_tensor(image)) for image in seen} <= new
    assert {key(decoded(file)) for file in files.values()} <= {*herded}
    assert not old.intersection(herded)


def originals_of(experience):
    return [original_image(experience.dataset, i) for i in range(len(experience.dataset))]


def test_saves_and_takes_back_its_files(tmp_path):
    buffer = HerdingBuffer(12, compression=Compression("webp", 40))
    again = HerdingBuffer(12, compression=Compression("webp", 40))
    for experience in stream_of()[:2]:
        buffer.post_adapt(AGENT, experience)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    stream = stream_of()
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True), stream)
    for _ in range(2):
        assert again._files == buffer._files
        assert [key(s[0]) for s in again.buffer.eval()] == [key(s[0]) for s in buffer.buffer.eval()]
        again.post_adapt(AGENT, stream[2])
        buffer.post_adapt(AGENT, stream[2])


def test_grey_images_stay_grey():
    buffer = HerdingBuffer(60, compression=Compression("webp", 90))
    buffer.post_adapt(AGENT, stream_of(photos=Photos(mode="L"))[0])
    assert buffer.buffer.eval()[0][0].shape == (1, 24, 24)


@pytest.mark.parametrize("distances", [[0.5, 0.3, 0.1], [0.5, 0.1, 0.1], [0.05] * 3, [0.9] * 3])
def test_the_lowest_quality_that_keeps_features_near(distances):
    """Distances at qualities up to 33, 66 and 100."""

    def features(quality):
        moved = 0.0 if quality is None else distances[min((quality - 1) // 33, 2)]
        return torch.tensor([[moved, 0.0], [0.0, moved]])

    near = [q for q in range(1, 101) if features(q).norm(dim=1).mean() <= 0.1]
    assert lowest_quality(features, 0.1) == (near[0] if near else 100)


def test_the_automatic_quality_is_that_of_the_networks_features():
    compression = Compression("jpeg", "auto", new_images=0, max_distance=0.1)
    buffer = HerdingBuffer(6, compression=compression)
    experience = stream_of()[0]
    buffer.post_adapt(AGENT, experience)
    images = originals_of(experience)

    def moved(quality):
        pairs = [(T.functional.to_tensor(i), decoded(file_of(i, "jpeg", quality))) for i in images]
        return np.mean([float((a / a.norm() - b / b.norm()).norm()) for a, b in pairs])

    sizes = {q: {len(file_of(i, "jpeg", q)) for i in images} for q in range(1, 101)}
    lowest = min(q for q in sizes if moved(q) <= 0.1)
    assert 1 < lowest < 100
    assert {len(file) for file in buffer._files.values()} <= sizes[lowest]


# --- new images -----------------------------------------------------------------------------------

APIS = ["nc", "nc relabelled", "nc with task labels", "ci"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("group", ["train", "eval"])
def test_other_images_leave_transforms_labels_and_order_alone(api, group):
    stream = stream_of(api)
    dataset = stream[0].dataset.concat(stream[1].dataset).subset([20, 3, 40, 3, 7])
    same = with_images(
        dataset,
        lambda part, targets: [
            (part.leaf[i][0], y) for i, y in zip(part.indices, targets, strict=True)
        ],
    )
    for ours, theirs in ((same, dataset), (same.subset([4, 1]), dataset.subset([4, 1]))):
        ours, theirs = ours.with_transforms(group), theirs.with_transforms(group)
        assert list(ours.targets) == list(theirs.targets)
        for i in range(len(theirs)):
            torch.manual_seed(i)
            expected = theirs[i]
            torch.manual_seed(i)
            found = ours[i]
            assert torch.equal(found[0], expected[0])
            assert found[1:] == expected[1:]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_new_images_pass_through_the_codec_with_a_probability(api, resident, probability):
    dataset = stream_of(api, transform=T.ToTensor())[0].dataset.train()
    compression = Compression("jpeg", 20)
    treated = through_codec(dataset, compression, probability=probability)
    clean = {key(x): int(y) for x, y, *_ in dataset}
    coded = {
        key(decoded(file_of(original_image(dataset, i), "jpeg", 20))): int(y)
        for i, y in enumerate(dataset.targets)
    }
    assert not clean.keys() & coded.keys()
    torch.manual_seed(0)
    if resident:
        loader = resident_loader(treated, 5, shuffle=True)
        assert loader is not None
        assert len(loader) == -(-len(dataset) // 5)
    else:
        loader = DataLoader(treated, 5, shuffle=True)
    hits, epochs = [], 40
    for _ in range(epochs):
        samples = [(key(x), int(y)) for batch in loader for x, y in zip(*batch[:2], strict=True)]
        assert len(samples) == len(dataset)
        assert all((clean | coded)[x] == y for x, y in samples)
        hits.append(sum(x in coded for x, _ in samples))
    n = epochs * len(dataset)
    deviation = (probability * (1 - probability) / n) ** 0.5
    assert abs(sum(hits) / n - probability) <= 4 * deviation
    assert probability == 1 or len(set(hits)) > 1


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_strategy_trains_on_new_images_as_the_setting_says(part):
    class Record(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            self.images = [key(x) for x, *_ in strategy.adapted_dataset]

    stream, record = stream_of(transform=T.ToTensor()), Record()
    model = ExpandableNetwork(lambda: tiny_backbone(in_channels=3), 3)
    replay = HerdingReplayPlugin(12, compression=Compression("webp", 40, part))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=16,
        plugins=[replay, record],
        evaluator=silent(),
    )
    for number, experience in enumerate(stream[:2]):
        memory = [key(x) for x, *_ in replay.buffer.buffer.eval()] if number else []
        strategy.train(experience)
        clean = {key(T.functional.to_tensor(image)) for image in originals_of(experience)}
        n = len(experience.dataset)
        assert record.images[n:] == memory
        hits = sum(image not in clean for image in record.images[:n])
        assert {0.0: hits == 0, 0.5: 0 < hits < n, 1.0: hits == n}[part]


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_the_fast_path_serves_compressed_exemplars(part, caplog):
    model = ExpandableNetwork(lambda: tiny_backbone(in_channels=3), 2)
    strategy = MEMO(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        mem_size=12,
        compression=Compression("webp", 40, part),
        train_mb_size=16,
        evaluator=silent(),
    )
    with caplog.at_level("INFO", logger="avalanche_memo"):
        for experience in stream_of():
            strategy.train(experience)
    paths = [r.message for r in caplog.records if "training batches" in r.message]
    assert len(paths) == 1
    assert "a resident tensor" in paths[0]


def test_a_class_holds_its_best_image_even_where_its_file_does_not_fit():
    noise = np.random.default_rng(0).integers(0, 256, (72, 24, 24), np.uint8)
    photos = Photos(mode="L")
    photos.images[1:] = [Image.fromarray(pixels) for pixels in noise[1:]]  # Files of 700 bytes.
    buffer = HerdingBuffer(6, compression=Compression("jpeg", 100))
    for experience in stream_of(photos=photos, transform=T.ToTensor()):
        buffer.post_adapt(AGENT, experience)
    assert {len(order) for order in buffer.order.values()} == {1}


def test_images_of_several_modes_keep_them():
    modes = ["L", "RGB"] * 36
    photos = Photos()
    photos.images = [image.convert(m) for image, m in zip(photos.images, modes, strict=True)]
    dataset = stream_of(photos=photos)[0].dataset
    treated = through_codec(dataset.eval(), Compression("webp", 90))
    channels = [len(original_image(dataset, i).getbands()) for i in range(len(dataset))]
    assert sorted(set(channels)) == [1, 3]
    assert [len(x) for x, *_ in treated] == channels


def test_a_larger_image_is_scaled_down_to_its_short_side():
    photo = Image.new("RGB", (60, 40))
    scaled = Image.open(io.BytesIO(Compression(short_side=20).encode(photo)))
    assert scaled.size == (30, 20)
    assert Image.open(io.BytesIO(Compression(short_side=80).encode(photo))).size == (60, 40)


def test_transform_groups_beside_train_and_eval_stay():
    groups = {"train": (AUGMENT, None), "eval": (T.ToTensor(), None), "tiny": (T.Resize(3), None)}
    dataset = as_classification_dataset(Photos(), transform_groups=groups).subset([5, 3])
    treated = through_codec(dataset, Compression("webp", 50)).with_transforms("tiny")
    assert treated[1][0].size == (3, 3)


class Inverted(Photos):
    """Holds pixels, but gives others."""

    @property
    def data(self):
        return np.stack([np.asarray(image) for image in self.images])

    def __getitem__(self, index):
        return Image.fromarray(255 - self.data[index]), self.targets[index]


def test_images_are_those_that_the_data_set_gives():
    dataset = stream_of(photos=Inverted())[0].dataset.eval()
    treated = through_codec(dataset, Compression("webp", 95)).eval()
    assert (treated[0][0] - dataset[0][0]).abs().mean() < 0.03


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "quality: expected 1 to 100 or 'auto', got 0"),
        ({"quality": 101}, "quality: .* got 101"),
        ({"quality": 75.5}, "quality: .* got 75.5"),
        ({"quality": "high"}, "quality: .* got 'high'"),
        ({"short_side": 0}, "short_side: expected at least 1 pixel, got 0"),
        ({"codec": "png"}, "codec: expected 'jpeg' or 'webp', got 'png'"),
        ({"new_images": 1.5}, "new_images: expected a part from 0 to 1, got 1.5"),
        ({"new_images": -0.1}, "new_images: .* got -0.1"),
        ({"quality": "auto"}, "new_images: expected 0 where the quality is chosen after"),
        ({"max_distance": 0.0}, "max_distance: expected above 0, to 2, got 0.0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Compression(**options)


@pytest.mark.parametrize(
    ("mode", "side", "message"),
    [
        ("F", 24, "compression: expected images of 8 bits .* got mode F"),
        ("RGBA", 24, "compression: .* got mode RGBA"),
        ("CMYK", 24, "compression: .* got mode CMYK"),
        ("L", 8, r"mem_size: expected room for a compressed image.* got 128 bytes"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_training(mode, side, message):
    model = ExpandableNetwork(lambda: tiny_backbone(in_channels=len(mode)), 3)
    before = [p.clone() for p in model.parameters()]
    strategy = Replay(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        mem_size=12,
        compression=Compression("jpeg", 100),
        evaluator=silent(),
    )
    with pytest.raises(ValueError, match=message):
        strategy.train(stream_of(photos=Photos(mode=mode, side=side), transform=T.ToTensor()))
    assert all(map(torch.equal, before, model.parameters()))


def test_transforms_that_are_not_known_are_refused_before_training():
    odd = (T.ToTensor(), lambda target: target)
    dataset = as_classification_dataset(Photos(), transform_groups={"train": odd, "eval": odd})
    memory = HerdingBuffer(600, compression=Compression("webp", 75, new_images=0))
    with pytest.raises(ValueError, match=r"compression: expected images to encode, but .*target"):
        memory.check(dataset, 6)


def test_images_that_cannot_be_reached_are_refused_before_training():
    class Floats(Photos):
        def __getitem__(self, index):
            return T.functional.to_tensor(self.images[index]), self.targets[index]

    dataset = as_classification_dataset(Floats())
    with pytest.raises(ValueError, match="compression: expected images to encode, but samples of"):
        HerdingBuffer(6, compression=Compression()).check(dataset, 6)


def test_fields_that_would_be_lost_are_refused_before_training():
    class More(Photos):
        def __getitem__(self, index):
            return *super().__getitem__(index), 0.5

    experience = stream_of(photos=More())[0]
    with pytest.raises(ValueError, match=r"compression: expected samples of 3 fields.* got 4"):
        HerdingBuffer(12, compression=Compression()).check(experience.dataset, 6)


def test_files_of_past_experiences_are_not_kept_decoded():
    model = ExpandableNetwork(lambda: tiny_backbone(in_channels=3), 3)
    strategy = Replay(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=8,
        mem_size=12,
        compression=Compression(new_images=0.5),
        evaluator=silent(),
        fast=True,
    )
    for experience in stream_of():
        strategy.train(experience)
        loading = [plugin for plugin in strategy.plugins if isinstance(plugin, ResidentBatches)]
        assert [len(plugin._decoded._images) for plugin in loading] == [0]
