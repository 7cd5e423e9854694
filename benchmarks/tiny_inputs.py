"""Inputs for a model or a part of one, and the forwards that together run given modules of it."""

import copy
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tiny_architectures import IMAGE, LENGTH, PATCH, VOCAB, WIDTH, is_list, read
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

MAIN_INPUTS = (
    "input_ids pixel_values input_features input_values pixel_values_videos flattened_patches past_values inputs "
    "hidden_states inputs_embeds".split()
)
BATCH, FRAMES = 2, 4
CROSS = ["query_embeds", "encoder_hidden_states", "cross_attention_states"]
# Sizes of the images of a batch, in patches; models that take them get all patches as one row.
GRIDS = {"grid_thw", "image_grid_thw", "grid_thws", "image_grid_hw", "video_grid_thw"}
TRIES = 24


@dataclasses.dataclass
class Run:
    """One forward that works: which part of the model (its path, "" for all of it), with what, what it reached."""

    part: str
    inputs: dict[str, Any]
    reached: set[str]


@torch.no_grad()
def forward(model: PreTrainedModel, run: Run) -> Any:
    set_seed(0)  # some forwards draw from torch, numpy or random
    return model.get_submodule(run.part)(**copy.deepcopy(run.inputs))


def reach(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> tuple[list[Run], dict[str, str]]:
    """Forwards that together run the target modules: the model's own first, then those of the parts around the rest.

    A codec runs as a whole only where none of its parts does.

    Returns:
        the runs, and for each part that none could be found for, the error of its first inputs.
    """
    runs, errors, reached = [], {}, set()
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: reached.add(name)) for name, m in targets.items()]
    missing = set(targets)

    def attempt(part: str, wanted: set[str], together: bool = False) -> None:
        for inputs in inputs_for(model.get_submodule(part), together):
            reached.clear()
            try:
                inputs = with_placeholders(model, part, inputs)
            except Exception as error:
                errors.setdefault(part, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
                continue
            if not wanted or reached & wanted:
                runs.append(Run(part, inputs, set(reached)))
                missing.difference_update(reached)
                errors.pop(part, None)
                return

    if not hasattr(model, "quantizer"):  # codes hide what changes before them: of a codec, its parts come first
        attempt("", set())
    tried = {""}
    while around := {part for name in missing for part in parts_around(model, name)} - tried:
        part = max(around, key=lambda path: path.count("."))
        tried.add(part)
        attempt(part, {name for name in missing if name.startswith(f"{part}.")})
    if missing:
        attempt("", set(missing))
    if len(senses(model)) > 1:
        attempt("", set(), together=True)
    for hook in hooks:
        hook.remove()
    return runs, errors


def with_placeholders(model: PreTrainedModel, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a part; where it misses the tokens that stand for an image or a sound in its text, put them there and rerun.

    Returns:
        the inputs that ran.
    """
    try:
        forward(model, Run(part, inputs, set()))
        return inputs
    except ValueError as error:
        counts = re.search(r"(image|video|audio|speech).*tokens:? (\d+)\D+(\d+)", str(error), re.I | re.S)
        ids, config, first = inputs.get("input_ids"), model.get_submodule(part).config, error
    kind = counts and {"speech": "audio"}.get(counts[1].lower(), counts[1].lower())
    token = setting(config, f"{kind}_token_id", f"{kind}_token_index")
    if not counts or not isinstance(ids, Tensor) or token is None:
        raise first
    for count in (int(counts[3]), int(counts[3]) // WIDTH):  # some count numbers in place of tokens
        added = torch.full((BATCH, count // BATCH), token)
        more = inputs | {"input_ids": torch.cat([added, ids], 1)}
        if isinstance(inputs.get("attention_mask"), Tensor):
            more["attention_mask"] = torch.cat([torch.ones_like(added), inputs["attention_mask"]], 1)
        if "mm_token_type_ids" in inspect.signature(model.get_submodule(part).forward).parameters:
            more["mm_token_type_ids"] = (more["input_ids"] == token) * (2 if kind == "video" else 1)
        try:
            forward(model, Run(part, more, set()))
            return more
        except ValueError:
            continue
    raise first


def senses(model: PreTrainedModel) -> set[str]:
    """Which of text, vision and audio a model takes in; a decoder's text is an output."""
    parameters = inspect.signature(model.forward).parameters
    takes = {model.input_modalities} if isinstance(model.input_modalities, str) else set(model.input_modalities)
    names = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}
    takes = {names[sense] for sense in takes if sense in names} or {"text"}
    if "input_ids" in parameters:
        return takes
    sights, sounds = IMAGES | GRIDS, {"input_features", "input_values", "audio"}
    unsaid = {"vision"} if sights & set(parameters) else {"audio"} if sounds & set(parameters) else {"text"}
    return takes - {"text"} or unsaid


def parts_around(model: PreTrainedModel, name: str) -> list[str]:
    """Paths of the models inside `model` that the module stands in."""
    pieces = name.split(".")
    paths = [".".join(pieces[:n]) for n in range(1, len(pieces))]
    return [path for path in paths if isinstance(model.get_submodule(path), PreTrainedModel)]


def inputs_for(part: PreTrainedModel, together: bool = False) -> Iterator[dict[str, Any]]:
    """Inputs to try, likeliest first: text alone, with and without padding, then more and more of what is accepted.

    Args:
        together: only inputs with something for every sense.
    """
    parameters = inspect.signature(part.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    main = list(part.main_input_name) if is_list(part.main_input_name) else [part.main_input_name]
    present = [name for name in MAIN_INPUTS if name in parameters]
    sensed = [name for name in present if name not in ("inputs_embeds", "hidden_states")]
    known = [n for n in parameters if n not in ("inputs_embeds", "hidden_states") and values_for(n, part, parameters)]
    choices = [
        main,
        ["input_ids"],
        [*main, *CROSS],
        present[:1],
        present[:2],
        sensed,
        present,
        known,
        ["inputs_embeds"],
        [],
    ]
    seen = []
    pairs = [["input_ids", name] for name in sensed if name != "input_ids"] + [sensed]
    for chosen in pairs if together else choices:
        names = list(dict.fromkeys([name for name in chosen if name in parameters] + required))
        if set(names) & set(MAIN_INPUTS):
            names += [name for name in ("decoder_input_ids", "decoder_input_values") if name in parameters]
        padded = [*names, "attention_mask"] if "input_ids" in names and "attention_mask" in parameters else names
        for wanted in (list(dict.fromkeys(padded)), list(dict.fromkeys(names))):
            if wanted in seen or not wanted:
                continue
            seen.append(wanted)
            options = [[(name, value) for value in values_for(name, part, parameters) or [None]] for name in wanted]
            for row in itertools.islice(itertools.product(*options), TRIES):
                inputs = dict(row)
                for name, value in row:
                    for companion, of_it in companions(name, value).items():
                        if companion in parameters and inputs.get(companion) is None:
                            inputs[companion] = of_it
                yield inputs


def companions(name: str, value: Any) -> dict[str, Any]:
    """What has to stand beside an input of this shape."""
    if not isinstance(value, Tensor):
        return {}
    if name == "input_ids":
        return {"bbox": torch.tensor([1, 2, 5, 9]).expand(*value.shape, 4)}
    if name == "input_features" and value.dim() == 3:
        frames = torch.ones(value.shape[0], max(value.shape[1:]), dtype=torch.long)
        masks = {"input_features_mask": frames.bool(), "feature_attention_mask": frames}
        return masks | {"is_longer": torch.zeros(value.shape[0], 1, dtype=torch.bool)}
    if (
        name in ("hidden_states", "pixel_values", "pixel_values_videos")
        and value.dim() in (2, 4)
        and len(value) == 16 * BATCH
    ):
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        return dict.fromkeys(GRIDS, grid) | {"image_grid_hw": grid[:, 1:], "merge_sizes": torch.tensor([1] * BATCH)}
    if name == "pixel_values" and value.dim() == 3:
        ones = torch.ones(value.shape[:2], dtype=torch.long)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(len(value), 16, 2)
        shapes = torch.tensor([[4, 4]] * len(value))
        return {
            "pixel_attention_mask": ones,
            "attention_mask": ones,
            "spatial_shapes": shapes,
            "pixel_position_ids": places,
        }
    if name == "pixel_values" and value.dim() == 6:
        ones = torch.ones(value.shape[:3], dtype=torch.long)
        seen = torch.ones(BATCH, LENGTH, 1, value.shape[2], dtype=torch.long)
        return {"aspect_ratio_ids": ones[..., 0], "aspect_ratio_mask": ones, "cross_attention_mask": seen}
    if name == "pixel_values" and value.dim() == 5:
        return {"image_attention_mask": torch.ones(BATCH, LENGTH, value.shape[1], dtype=torch.long)}
    return {}


def setting(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config has, or one of its sub-configs."""
    for place in (config, *(c for c in vars(config).values() if isinstance(c, PreTrainedConfig))):
        found = next((read(place, name) for name in names if read(place, name) is not None), None)
        if found is not None:
            return found
    return default


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = (value.get("height", IMAGE), value.get("width", IMAGE))
    return (value[-2], value[-1]) if is_list(value) and len(value) > 1 else (value[0] if is_list(value) else value,) * 2


def values_for(name: str, part: PreTrainedModel, parameters: Mapping[str, Any]) -> list[Any]:
    """Values to try for one parameter of a forward, likeliest first; none where nothing is known of it."""
    config = part.config
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(min(5, high - 1), high, shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids", "context_input_ids", "task_inputs"):
        high = max(6, min(setting(config, "vocab_size", default=VOCAB), 100))
        # Another length than the encoder's, so that cross-attention cannot be mistaken for self-attention.
        length = LENGTH - 4 if name.startswith("decoder") else setting(config, "task_seq_len", default=LENGTH)
        books = {setting(config, n) for n in ("num_codebooks", "n_codes_total", "num_channels")} - {None, 1, 3}
        books |= {read(place, "num_channels") for place in (read(config, "decoder_config"),)} - {None, 1, 3}
        of_books = [(shape) for n in sorted(books) for shape in ((BATCH, length, n), (BATCH * n, length))]
        return [whole(high, BATCH, length), *(whole(30, *shape) for shape in of_books)]
    if name in ("attention_mask", "encoder_attention_mask"):
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, -3:] = 0
        return [mask]
    if name in ("hidden_states", "inputs_embeds", "x", "context", "image_features", "inputs", "latents", *CROSS):
        widths = ["hidden_size", "d_model", "embed_dim", "hidden_dim", "dim"]
        if name in CROSS[1:]:
            widths = ["encoder_hidden_size", "cross_attention_hidden_size", "encoder_width", "vision_width", *widths]
        width = setting(config, *widths, default=WIDTH)
        width = width[0] if is_list(width) else width
        if not (name == "hidden_states" and GRIDS & set(parameters)):
            length = LENGTH + 4 if name in CROSS[1:] else LENGTH
            choices = [normal(BATCH, length, width), normal(length, width), normal(BATCH, width, 8, 8)]
            if name == "latents" or name == "hidden_states" and read(config, "vocab_size") is None:
                choices += [images(name, config, parameters, normal)[0], normal(BATCH, width, LENGTH)]
            return choices
    if name in IMAGES or name == "hidden_states":
        return images(name, config, parameters, normal)
    if name in (
        "input_features",
        "audio_mel",
        "input_values",
        "decoder_input_values",
        "audio",
        "waveform",
        "audio_values",
    ):
        return sounds(name, config, parameters, normal)
    if name == "flattened_patches":
        size = setting(config, "num_channels", default=3) * pair(setting(config, "patch_size", default=PATCH))[0] ** 2
        where = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(BATCH, LENGTH, 2)
        return [torch.cat([where, normal(BATCH, LENGTH, size)], -1)]
    if name in GRIDS:
        return [torch.tensor([[4, 4] if name == "image_grid_hw" else [1, 4, 4]] * BATCH)]
    return [series_and_others(name, config, normal, whole)] if name in OTHERS else []


IMAGES = set("pixel_values pixel_values_videos images image video prompt_pixel_values prompt_masks".split())


def images(name: str, config: PreTrainedConfig, parameters: Mapping[str, Any], normal: Any) -> list[Tensor]:
    channels = setting(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    high, wide = pair(setting(config, "max_img_size", "image_size", "img_size", "input_size", default=IMAGE))
    high = high // 2 if "prompt_masks" in parameters else high
    patch = pair(setting(config, "patch_size", default=PATCH))[0]
    deep = pair(setting(config, "temporal_patch_size", default=1))[0]
    frames = setting(config, "num_frames", "frames_per_clip", default=FRAMES)
    flat = channels * patch * patch
    if GRIDS & set(parameters) and name != "pixel_values_videos":
        n = BATCH * 16
        row = [normal(n, flat * deep), normal(n, channels, patch, patch), normal(1, n, channels, patch, patch)]
        return [*row, normal(n, flat * 2), normal(BATCH, channels, high, wide)]
    if "aspect_ratio_ids" in parameters and name == "pixel_values":
        return [normal(BATCH, 1, setting(config, "max_num_tiles", default=4), channels, high, wide)]
    if "target_sizes" in parameters:
        return [normal(1, channels, patch, patch * 16)]
    video = [normal(BATCH, frames, channels, high, wide), normal(BATCH, channels, frames, high, wide)]
    one = [normal(BATCH, channels, high, wide), normal(BATCH, 16, flat), normal(BATCH, 2, channels, high, wide)]
    rest = [normal(BATCH, channels, 224, 224), normal(BATCH, 1, high, wide), normal(16, channels, patch, patch)]
    return video + one if name == "pixel_values_videos" else one + video + rest


def sounds(name: str, config: PreTrainedConfig, parameters: Mapping[str, Any], normal: Any) -> list[Tensor]:
    fields = (
        "num_mel_bins",
        "feature_size",
        "n_mels",
        "input_feat_per_channel",
        "input_dim",
        "input_size",
        "hidden_size",
    )
    bins = list(dict.fromkeys(n for n in (setting(config, f) for f in fields) if isinstance(n, int)))
    bins = [n * setting(config, "num_stacked_frames", default=1) for n in bins[:1]] + bins[1:] + [80, 128, 320]
    if "feature_lens" in parameters:
        return [normal(n, 64) for n in bins]
    length = 2 * setting(config, "max_source_positions", default=100)
    frames = [(BATCH, 64, n) for n in bins[:2]] + [(BATCH, n, t) for n in bins[:2] for t in (length, 200, 64)]
    frames += [(BATCH, 1, 64, bins[0])] + [(BATCH, 64, n) for n in bins[2:]]
    waves = [
        (BATCH, 4000),
        (BATCH, 1, 4000),
        (BATCH, setting(config, "max_length", default=128), bins[0]),
        (BATCH, 1, 8192),
    ]
    waves += [(BATCH, LENGTH, setting(config, "hidden_size", default=WIDTH))]
    return [normal(*shape) for shape in (frames if name in ("input_features", "audio_mel") else waves)]


OTHERS = set(
    "past_values past_time_features past_observed_mask future_values future_time_features past_values_padding freq "
    "observed_mask visual_feats visual_pos target_sizes aspect_ratio_ids aspect_ratio_mask feature_lens aftercnn_lens "
    "codebook_idx states actions rewards returns_to_go timesteps bool_masked_pos audio_mel_mask "
    "pixel_position_ids image_embeds_position_mask".split()
)


def series_and_others(name: str, config: PreTrainedConfig, normal: Any, whole: Any) -> Any:
    if name in ("past_values", "past_observed_mask", "past_time_features", "observed_mask", "past_values_padding"):
        lags = setting(config, "lags_sequence", default=[0])
        steps = setting(config, "context_length", "patch_length", default=LENGTH) + max(lags)
        channels = setting(config, "num_input_channels", default=0)
        shape = (BATCH, steps, channels) if channels else (BATCH, steps)
        if name == "past_time_features":
            return normal(BATCH, steps, setting(config, "num_time_features", default=0))
        if name == "past_values_padding":
            return torch.zeros(shape)
        return normal(*shape) if name == "past_values" else torch.ones(shape)
    steps = setting(config, "prediction_length", default=4)
    shapes = {
        "future_values": (BATCH, steps),
        "future_time_features": (BATCH, steps, setting(config, "num_time_features", default=0)),
        "visual_feats": (BATCH, 8, setting(config, "visual_feat_dim", default=WIDTH)),
        "visual_pos": (BATCH, 8, setting(config, "visual_pos_dim", default=4)),
        "states": (BATCH, LENGTH, setting(config, "state_dim", default=17)),
        "actions": (BATCH, LENGTH, setting(config, "act_dim", default=4)),
        "rewards": (BATCH, LENGTH, 1),
        "returns_to_go": (BATCH, LENGTH, 1),
    }
    if name in shapes:
        return normal(*shapes[name])
    return {
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        "timesteps": whole(10, BATCH, LENGTH),
        "target_sizes": torch.tensor([[4, 4]]),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, setting(config, "max_num_tiles", default=4), dtype=torch.long),
        "feature_lens": torch.tensor([64]),
        "aftercnn_lens": torch.tensor([32]),
        "codebook_idx": 1,
        "bool_masked_pos": torch.zeros(BATCH, 16, dtype=torch.bool),
        "image_embeds_position_mask": (torch.arange(LENGTH) < 8).expand(BATCH, LENGTH),
        "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2),
    }[name]
