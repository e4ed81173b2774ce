"""The typed schema of a run: every key of a configuration, its type, its default and what it may hold.

No torch in here: a mistake in a configuration is answered before anything heavy is imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Union

from omegaconf import MISSING

from lba_exp import registry
from lba_exp.config_parts import AugmentationSchema, setting


@dataclass
class MixerSchema:
    kind: str = setting("linear", "token mixer", names=registry.MIXERS)
    feature_map: str = setting("silu_normalised", "feature map on q and k", names=registry.FEATURE_MAPS)
    gate: str = setting("selective", "decay: none, learned, or computed from the token; per head or per channel", names=registry.GATES)
    gate_init: str = setting(
        "timescales",
        "initial decays: log-spaced memory lengths, the paper's random ones, RetNet's, or a HiPPO diagonal (n + 1 or 1/2)",
        choices=("timescales", "random", "retnet", "hippo", "hippo_lin"),
    )
    gate_trained: bool = setting(True, "false: the decays stay as they start")
    dt_min: float = setting(1e-3, "smallest step of the HiPPO diagonal", above=0)
    dt_max: float = setting(1e-1, "largest step of the HiPPO diagonal", above=0)
    convention: str = setting("key", "which token's gate decays a step", choices=("key", "query", "symmetric"))
    complement_keys: bool = setting(False, "multiply keys by 1 - decay, as Gated RFA does")
    open_first: bool = setting(False, "the first token's gate is 1, as the class token's in the paper's vision code")
    scale: str = setting(
        "after", "divide by the sum of the scores after or before the decays act, or not at all", choices=("after", "before", "none")
    )
    norm: str = setting("none", "norm after attention; group: each head by itself", choices=("none", "layer", "rms", "group"))
    norm_eps: float = setting(1e-5, "added to the variance of that norm", above=0)
    output_gate: str = setting("none", "multiply the output by SiLU(W x + b) or sigmoid(W x + b)", choices=("none", "silu", "sigmoid"))
    direction: str = setting(
        "both",
        "which side a token reads; alternating: forward, backward, ... by layer",
        choices=("both", "forward", "backward", "alternating"),
    )
    diagonal: str = setting("once", "how often a token's own score counts; twice: the directions' plain sum", choices=("once", "twice"))
    scan: str = setting(
        "raster",
        "order of a grid's tokens: as they come, every other row backwards, or snakes over rows and over columns",
        choices=("raster", "snake", "multi"),
    )
    form: str = setting("parallel", "form used in training", choices=("parallel", "recurrent", "chunkwise", "fused", "auto"))
    chunk_size: int = setting(64, "tokens per chunk of the chunkwise form", low=1)
    options: dict[str, Any] = setting({}, "further keyword arguments of the mixer, for kinds other than linear and softmax")


@dataclass
class ModelSchema:
    name: str = setting(MISSING, "the variant's name in folders and tables")
    kind: str = setting("sequence_classifier", "model", names=registry.MODELS)
    width: int = setting(64, "features per token", low=1)
    depth: int = setting(3, "number of blocks", low=1)
    heads: int = setting(4, "heads per mixer; divides width", low=1)
    mlp: str = setting("mlp", "GELU MLP, gated MLP, or S5's GLU on the mixer's output instead", choices=("mlp", "glu", "output_glu"))
    mlp_ratio: float = setting(2.0, "hidden width of the MLP over width", above=0)
    dropout: float = setting(0.1, "dropout on the residual branches", low=0, high=0.99)
    drop_path: float = setting(0.0, "stochastic depth: share of samples that skip a branch, in the last block", low=0, high=0.99)
    norm: str = setting("layer", "layer norm, or batch norm over the real tokens", choices=("layer", "batch"))
    norm_position: str | None = setting(
        None, "norm before or after each residual branch; default: post for masked language models, else pre", choices=("pre", "post")
    )
    positional_embedding: bool = setting(True, "add a learned embedding of the position")
    pooling: str = setting(
        "mean",
        "how tokens become one vector; mean_all: the mean over all tokens, a class token among them",
        choices=("mean", "class_token", "mean_all"),
    )
    patch_size: int = setting(16, "height and width of a vision model's patches in pixels", low=1)
    gradient_checkpointing: bool = setting(False, "compute blocks again in the backward pass: less memory, more time")
    mixer: MixerSchema = field(default_factory=MixerSchema)


@dataclass
class DataSchema:
    kind: str = setting("pixel_sequences", "data module", names=registry.DATA)
    name: str | None = setting(None, "name in folders and tables; default: from source")
    source: str = setting(MISSING, "digits (embedded), a local folder, or a hub name for datasets.load_dataset")
    image_column: str = setting("image", "column that holds the image")
    label_column: str = setting("label", "column that holds the class")
    size: int | None = setting(None, "resize images to size x size pixels", low=1)
    padded_size: int | None = setting(None, "pad images with 0 all around to padded_size x padded_size pixels", low=1)
    eval_resize: int | None = setting(
        None, "shorter side in pixels, of which validation and test take the middle, size x size; default: size", low=1
    )
    channels: int = setting(3, "an image as colours, 3, or grey, 1", low=1, high=3)
    channel_mean: list[float] | None = setting(None, "each channel's mean of pixels of 0 to 1; default: the training split's own")
    channel_deviation: list[float] | None = setting(None, "each channel's standard deviation; default: the training split's own")
    classes: int | None = setting(None, "number of classes that the data must have; default: any", low=2)
    unreadable: str = setting(
        "error", "images that cannot be read end the run, or are looked for at its start, skipped and counted", choices=("error", "skip")
    )
    pixel_mean: float | None = setting(None, "taken off pixels of 0 to 1; default: the training split's mean", low=0, high=1)
    pixel_deviation: float | None = setting(None, "pixels are divided by it; default: the training split's deviation", above=0)
    validation_fraction: float = setting(0.1, "share cut from the training data where there is no validation split", above=0, high=0.5)
    test_fraction: float = setting(0.2, "share cut from the training data where there is no test split", above=0, high=0.5)
    split_seed: int = setting(0, "seed of those cuts; apart from the run's seed, so that all seeds share one test split", low=0)
    batch_size: int = setting(64, "sequences per batch and device", low=1)
    global_batch_size: int | None = setting(
        None, "sequences per optimizer step over all devices, in place of batch_size: the run is then the same on any number", low=1
    )
    eval_batch_size: int = setting(256, "sequences per batch in validation and test", low=1)
    workers: int = setting(0, "processes that load data", low=0)
    augment: str = setting("none", "training augmentation: none, or shifts by up to a pixel", choices=("none", "shift"))
    layout: str = setting("pixels", "an image as a sequence of pixels, or whole, for models that cut patches", choices=("pixels", "image"))
    text_column: str = setting("text", "column that holds the text")
    tokens: str = setting("wordpiece", "what a text is cut into", choices=("wordpiece", "bpe", "bytes"))
    vocabulary: str | None = setting(None, "WordPiece tokens, one a line (vocab.txt), or a tokenizer.json; the file, or its folder")
    vocabulary_size: int | None = setting(None, "tokens of a vocabulary trained on the training texts, in place of data.vocabulary", low=64)
    lowercase: bool = setting(
        True, "texts are put into lower case, without accents, as an uncased vocabulary needs; a tokenizer.json says so itself"
    )
    cache: str | None = setting(None, "folder for trained vocabularies and tokens; default: lba_exp in the cache of datasets")
    shuffle_blocks: int = setting(10_000, "blocks of a stream that are shuffled among themselves", low=1)
    eval_texts: int = setting(10_000, "texts of a stream's validation and test split that are read, the first ones", low=1)
    max_length: int = setting(128, "tokens of a block of text, or of a text at most", low=8)
    objective: str = setting("masked", "predict masked tokens, or the next one", choices=("masked", "causal"))
    mask_fraction: float = setting(0.3, "share of the tokens that training predicts", above=0, high=0.9)
    eval_mask_fraction: float = setting(0.15, "share of the tokens that validation and test predict", above=0, high=0.9)
    second_text_column: str | None = setting(None, "column that holds the second text of a pair")
    target: str = setting("classes", "a text's label is one of some classes, or a number", choices=("classes", "number"))
    metrics: list[str] = setting(
        [], "metrics of validation and test, whose mean is the score: accuracy, f1, matthews; of numbers: pearson, spearman"
    )
    pad_multiple: int = setting(8, "batches of texts are padded to a multiple of so many tokens", low=1)
    bucket_steps: int = setting(50, "texts are sorted by length among so many steps; 0: not at all", low=0)
    train_split: str | None = setting(None, "the source's name of its training split; default: train, training")
    validation_split: str | None = setting(None, "the source's name of its validation split; default: validation, valid, val, dev")
    test_split: str | None = setting(None, "the source's name of its test split; default: test, testing")
    glue_task: str | None = setting(
        None,
        "the task whose files in GLUE's own layout may be the source",
        choices=("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"),
    )


@dataclass
class OptimSchema:
    lr: float = setting(2e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = setting(0.05, "decoupled weight decay; never on norms, biases, embeddings of position and gates", low=0)
    decay_per_step: bool = setting(
        False,
        "what weight_decay says: false: a step takes off weight_decay x rate of a weight (torch's AdamW); true: weight_decay x rate / peak "
        "rate (MosaicML's DecoupledAdamW)",
    )
    betas: list[float] = setting([0.9, 0.999], "AdamW's two averaging rates")
    eps: float = setting(1e-8, "added to AdamW's denominator", above=0)
    warmup_fraction: float = setting(0.1, "share of all steps in which the rate rises linearly", low=0, high=1)
    schedule: str = setting("cosine", "how the rate falls after its rise", choices=("cosine", "linear"))
    final_fraction: float = setting(0.0, "the rate at the end over the peak rate", low=0, high=1)
    label_smoothing: float = setting(0.1, "label smoothing of the training loss", low=0, high=0.99)
    lr_batch: int | None = setting(None, "lr is for steps of so many samples, and scaled to the run's own; default: lr as it is", low=1)
    warmup_epochs: float | None = setting(None, "epochs in which the rate rises, in place of warmup_fraction", low=0)
    ema_decay: float | None = setting(
        None,
        "validation, test and checkpoints have the moving average of the weights: d * average + (1 - d) * weights a step; default: none",
        above=0,
        high=0.999999,
    )


@dataclass
class ParitySchema:
    mode: str = setting("check", "check warns, strict ends the run, off measures nothing", choices=("off", "check", "strict"))
    tolerance: float = setting(1e-4, "largest relative L2 error of the float32 logits", above=0)
    operator_tolerance: float = setting(2e-5, "largest relative L2 error of the float32 operator against float64", above=0)
    full: bool = setting(False, "accuracy of each form on the whole validation split after each validation")
    full_test: bool = setting(True, "accuracy of each form on the whole test split")
    memory_budget_gib: float = setting(4.0, "skip a form whose estimated working memory exceeds this", above=0)


@dataclass
class LoggerSchema:
    wandb: str = setting("offline", "Weights & Biases: off, offline (no network touched) or online", choices=("off", "offline", "online"))
    project: str = setting("lba_exp", "W&B project")
    entity: str | None = setting(None, "W&B entity")
    tags: list[str] = setting([], "W&B tags, beside the variant's and the data set's names")


@dataclass
class CheckpointSchema:
    every_n_steps: int | None = setting(
        None, "save a resumable checkpoint every n optimizer steps, beside those after each validation", low=1
    )
    monitor: str = setting(
        "val/accuracy",
        "metric that chooses the best checkpoint; among equal accuracies or scores (the mean of data.metrics) the loss",
        choices=("val/accuracy", "val/loss", "val/score"),
    )


@dataclass
class EfficiencySchema:
    target_accuracy: float | None = setting(None, "validation accuracy whose first time is put on record", above=0, high=1)


@dataclass
class OriginSchema:
    """Filled in when a configuration is composed, not by the user."""

    experiment: str | None = setting(None, "entry of experiments/ that was selected")
    sweep: str | None = setting(None, "entry of sweeps/ that the run belongs to, or wandb- and the id of W&B's own sweep")
    trial: str | None = setting(None, "id of the trial of W&B's own sweep that the run is")
    debug: str | None = setting(None, "entry of conf/debug/ that was selected")
    row: str | None = setting(None, "name of the sweep's variant (sweep.variants) that the run is")
    row_overrides: list[str] | None = setting(None, "the overrides that this name stands for")
    overrides: list[str] = setting([], "what was overridden, in order")


@dataclass
class SweepSchema:
    """What a sweep varies: set by the files of sweeps/, never part of a run's own configuration."""

    grid: dict[str, Any] = setting({}, "key -> list of values; every combination of all keys is a job")
    zip: list[Any] = setting([], "groups of keys, each with a list of values of one length, that are walked together; a group is one axis")
    variants: dict[str, Any] = setting({}, "name of a row -> its overrides, as on the command line; the rows are one axis")
    exclude: list[Any] = setting([], "combinations left out: key (or row) -> a value or a list of values")
    only: list[str] = setting([], "names of the variants to run; default: all")


# Trainer arguments that other parts of a run own, and where to set them instead.
TRAINER_OWNED = {
    "logger": "use logger=csv|wandb|wandb_offline",
    "callbacks": "callbacks are set by parity=, checkpoint. and the run itself",
    "plugins": "plugins are objects that YAML cannot express",
    "default_root_dir": "use root= or folder=",
}


@cache
def trainer_schema() -> type:
    """The arguments of ``lightning.pytorch.Trainer`` that YAML can express, as a dataclass, read from Lightning's source (no import)."""
    source = Path(find_spec("lightning").origin).parent / "pytorch" / "trainer" / "trainer.py"
    tree = ast.parse(source.read_text("utf-8"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    known = {"Optional": Optional, "Union": Union, "int": int, "float": float, "bool": bool, "str": str}
    members = []
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        if argument.arg in TRAINER_OWNED:
            continue
        try:
            kind = eval(ast.unparse(argument.annotation), {"__builtins__": {}}, known)
        except (NameError, TypeError):  # a class of Lightning's or a list: left to Lightning's own check
            kind = Any
        members.append((argument.arg, kind, field(default=ast.literal_eval(default))))
    return make_dataclass("TrainerSchema", members)


@dataclass
class RunSchema:
    """A run. Groups (model, data, ...) have files under conf/; every key can be set on the command line."""

    name: str | None = setting(None, "the run's name; default: the variant and what was overridden")
    task: str = setting("classification", "task", names=registry.TASKS)
    seed: int = setting(0, "seed of weights, order of data and dropout", low=0, high=2**32 - 1)
    root: str = setting("runs", "folder that holds the run folders")
    folder: str | None = setting(None, "the run's own folder; default: root/group/name/seed")
    resume: str = setting("auto", "auto: go on where the folder's run stopped; never: start anew; or a checkpoint to go on from")
    init_from: str | None = setting(
        None, "run folder, checkpoint, model folder or its model.safetensors, to take weights from, and nothing else"
    )
    plugins: list[str] = setting([], "modules to import first: they register mixers, gates, models, tasks, data")
    compile: bool | str = setting(
        False,
        "torch.compile in training, validation and test: true: of the model's blocks; graphs: of the whole model, for each shape of a "
        "batch, as CUDA graphs",
        choices=(False, True, "graphs"),
    )
    sequence_parallel_size: int = setting(
        1, "devices that share each sequence, a block of consecutive tokens each; divides the number of devices", low=1
    )
    threads: int | None = setting(None, "CPU threads of torch; default: torch's own choice", low=1)
    model: ModelSchema = field(default_factory=ModelSchema)
    data: DataSchema = field(default_factory=DataSchema)
    augmentation: AugmentationSchema = field(default_factory=AugmentationSchema)
    optim: OptimSchema = field(default_factory=OptimSchema)
    trainer: Any = field(default_factory=lambda: trainer_schema()())
    parity: ParitySchema = field(default_factory=ParitySchema)
    logger: LoggerSchema = field(default_factory=LoggerSchema)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    efficiency: EfficiencySchema = field(default_factory=EfficiencySchema)
    origin: OriginSchema = field(default_factory=OriginSchema)


@dataclass
class CommandSchema(RunSchema):
    """What a command composes: a run, and beside it what a sweep varies."""

    sweep: SweepSchema = field(default_factory=SweepSchema)


def run_schema() -> RunSchema:
    """An instance with all defaults; ``trainer`` gets its type from the installed Lightning."""
    return _typed(RunSchema())


def command_schema() -> CommandSchema:
    """As ``run_schema``, with the ``sweep`` node."""
    return _typed(CommandSchema())


def _typed(schema: RunSchema) -> Any:
    schema.__dataclass_fields__["trainer"].type = trainer_schema()
    return schema
