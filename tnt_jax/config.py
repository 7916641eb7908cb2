"""The whole of a run as frozen dataclasses, and `check`, which looks at every field.

A config file returns one `TrainConfig`, the command line changes its fields.
"""

import dataclasses
from typing import Generic, Literal, TypeVar

from tnt_jax.errors import InputError
from tnt_jax.fields import changes_of, faults, setting
from tnt_jax.tasks.table import TASKS, LossName, TaskName, with_setting
from tnt_jax.tasks.task import Outputs


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All sizes of a model. `ModelChanges` is what a config file or the command line says of it.

    TNT has one size for all blocks; PyramidTNT has one for each of its four stages.
    Source of the sizes: table 1 of arXiv 2103.00112, and the code of arXiv 2201.00978.
    """

    name: str
    """A name from `tnt_jax.list_models()`. A model of other sizes than the published ones is called custom."""
    image_size: tuple[int, int] = setting(least=1)
    """Height and width of the input in pixels, each a multiple of the patch size; one number for a square."""
    in_channels: int = setting(least=1)
    """Channels of the input: 3 for colour, 1 for grey."""
    num_classes: int = setting(least=0)
    """Width of the output; 0 gives the normalised class token instead of logits."""
    architecture: Literal["official", "legacy", "pyramid"]
    """TNT as huawei published it, TNT as mmpretrain and timm first had it, or PyramidTNT."""
    patch_size: int = setting(least=1)
    """Side of a patch (sentence) in pixels."""
    word_stride: int = setting(least=1)
    """Pixels from one word to the next; a patch has ceil(patch_size / word_stride) squared words."""
    depth: int | tuple[int, ...] = setting(least=1)
    """Number of blocks; for PyramidTNT in each stage, such as 2 8 4 2."""
    inner_dim: int | tuple[int, ...] = setting(least=1)
    """Channels of a word; for PyramidTNT in each stage."""
    inner_heads: int | tuple[int, ...] = setting(least=1)
    """Heads of the attention between the words of a patch; for PyramidTNT in each stage."""
    outer_dim: int | tuple[int, ...] = setting(least=1)
    """Channels of a sentence; for PyramidTNT in each stage."""
    outer_heads: int | tuple[int, ...] = setting(least=1)
    """Heads of the attention between sentences; for PyramidTNT in each stage."""
    inner_blocks: tuple[int, ...] = setting(least=0)
    """Blocks with an inner transformer, from 0 on: all of TNT's; of a PyramidTNT stage the first, and the second if it
    has more than six."""
    squeeze_excitation: bool
    """Squeeze-and-excitation after the MLP between sentences (table 12 of the paper)."""
    word_positions: bool
    """Learned positions of words (table 6 of the paper)."""
    sentence_positions: bool
    """Learned positions of sentences (table 6 of the paper)."""
    mlp_ratio: float = setting(above=0)
    """Hidden channels of an MLP over its channels."""
    drop_rate: float = setting(least=0, below=1)
    """Dropout after the positions, in every MLP and after every attention."""
    attn_drop_rate: float = setting(least=0, below=1)
    """Dropout of attention weights."""
    drop_path_rate: float = setting(least=0, below=1)
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    dtype: Literal["float32", "bfloat16"]
    """The dtype of computation. Statistics of norms, softmax and logits are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"]
    """The dtype of parameters in computation and exports. Training keeps them, their average and Adam's in float32."""
    remat: Literal["none", "linear", "all"] = setting(role="execution")
    """The part that the backward pass computes again instead of keeping it, for less memory and more time: nothing; all
    of a block but what its linear maps return; or all of it."""
    inner: Literal["auto", "reference", "native", "feature_major", "pallas", "cuda"] = setting(role="execution")
    """The way to compute the inner transformers, and what goes with it between sentences: a kernel on TPUs (pallas),
    attention in C on CPUs (auto, native) and cuDNN's on GPUs (cuda). auto is what is fastest on the platform; the
    results are the same. cuda has not run on a GPU yet, and auto does not choose it: docs/gpus.md."""
    head: Literal["class", "linear", "mlp", "mlp_words", "retinanet", "detr", "detr_unpooled"] = "class"
    """The last part: class is one map of the class token (PyramidTNT: of the mean), for the image. For every pixel
    linear is Segmenter's head over the last sentences, mlp SegFormer's over maps of four scales, and mlp_words has the
    words of a TNT too. For boxes there are retinanet, and detr, which is for a TNT; detr_unpooled is as transformers
    has it, without what the paper puts before it: the norm, and the mean over 2 x 2 sentences."""
    head_drop_rate: float = setting(0.0, least=0, below=1)
    """Dropout of a head: of mlp and mlp_words before their last map, of detr in all of its layers; others have none.
    SegFormer's and DETR's authors take 0.1; with little data DETR does far better without (docs/detection.md)."""


ModelChanges = changes_of(
    ModelConfig,
    {"name": (str, "tnt_s_patch16_224"), "image_size": (int | tuple[int, int] | None, None)},
    """A published model by its name, and what is to differ from it. A field that is None is as the name has it.

    `tnt_jax.models.variants.resolve` makes the complete `ModelConfig` of it.
    """,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of images, their augmentation, and the form in which the network is fed.

    The defaults are the published recipe. Small data switches off what does not suit it: `crop_area=None`,
    `random_flip=0`, `randaugment_ops=0` and so on.
    Source: the command in the readme of huawei's tnt_pytorch, and what its train.py and timm 0.3 make of it.
    """

    source: str = setting("digits", role="execution")
    """`digits`, `idx:FOLDER`, `folder:PATH`, `csv:FILE`, `npy:PATH`, `hf:NAME`, `tfds:NAME`, `array_record:PATH`,
    `masks:PATH`, `coco:PATH`, `voc:PATH`, `boxes:PATH` or `synthetic`; see docs/data.md. A run may go on with the same
    data at another place: what it holds is compared."""
    train_split: str = "train"
    """The split that training reads. TFDS takes its slices here, `train[:90%]`."""
    eval_split: str | None = setting(None, role="execution")
    """The split that evaluation reads. By default training evaluates, and chooses the best checkpoint on, the
    validation split where there is one (`val`, `valid` or `validation`), or what `holdout` or `fold` leaves, or the
    test split; and `eval.py` reports the test split where there is one. A name is for both."""
    task: TaskName = Outputs.task
    """The task: one class an image (single_label), any number of labels (multi_label), numbers (regression), the class
    of each pixel (segmentation), or boxes (detection)."""
    holdout: float = setting(0.0, least=0, below=1)
    """Share of the training images that is evaluated instead of trained on where the source has no `eval_split`, or by
    default no validation split. It is drawn by `split_seed` and stratified: each class gives the same share."""
    fold: str | None = None
    """K/N: the K-th of N stratified folds of the training images is evaluated, the others are trained on."""
    split_seed: int = setting(0, least=0)
    """Of `holdout` and `fold`, so that runs with several seeds share their images."""
    class_names: str | None = setting(None, role="execution")
    """File with the names of the classes in their order: one a line, or JSON. By default the classes are those of the
    training images, sorted, numbers in them as numbers."""
    other_classes: bool = False
    """Allow classes that only the evaluated split has: the model gets an output for them that is never trained."""
    image_column: str | None = None
    """Column of a table (`csv:`, `hf:`) with the paths of the images; by default `image`, `path`, `file` and so on."""
    label_columns: tuple[str, ...] = ()
    """Columns with the labels: one of class names or numbers, or for multi_label and regression one for each output.
    By default `label`, `labels` and so on; for regression `target`, or all other columns of numbers; for segmentation
    `mask`, with the path of a mask."""
    ignore: tuple[int, ...] = setting((), least=0, most=65534)
    """segmentation: values of masks that are no class, beside 255, or 65535 of more than 255 classes. The classes are
    the other values in their order: of ADE20K, whose 0 is unlabelled, 0 makes 1 the first class."""
    label_separator: str | None = None
    """The separator of the labels of a cell (multi_label); by default the first of `|`, `;`, `,` that occurs."""
    split_column: str | None = None
    """Column with the split of each row; by default `split`, where there is one."""
    fold_column: str | None = None
    """Column with the fold of each row, for `fold`; by default `fold`, where there is one."""
    group_column: str | None = None
    """Column with what must not be divided by `holdout` and `fold`, such as the patient; by default `group`."""
    weight_column: str | None = None
    """Column with how often each training image is drawn, relative to the others; by default `weight`."""
    encoding: str | None = None
    """Encoding of a table of text; by default UTF-8, or UTF-16 where its first bytes say so."""
    depth: Literal["uint8", "uint16", "float32"] | None = None
    """Type that every image is converted to. By default that of the first image, and another is refused."""
    white: float | None = setting(None, above=0)
    """Sample that is white, where files do not say it: 4095 for 12 bits in 16. By default 255 for 8 bits, 65535 for 16
    and 1 for floats between 0 and 1; other types of samples must be told. 1 takes floats of any range as they are."""
    max_pixels: int = setting(2**28, least=1)
    """Images of more pixels are taken for decompression bombs, and are refused before they are decoded."""

    sampling: Literal["natural", "balanced", "sqrt"] = "natural"
    """The frequency of each class (multi_label: label) in an epoch: natural is each image once; balanced is all classes
    alike, images of rare ones several times and of frequent ones not all; sqrt is between them, in proportion to the
    root of how many images a class has."""
    repeats: int = setting(3, least=1)
    """Repeated augmentation: each image of an epoch comes this many times in a batch, an epoch sees that many times
    fewer images; 1 is the ordinary order."""
    crop_area: tuple[float, float] | None = setting((0.08, 1.0), above=0, most=1)
    """Random resized crop: share of the image's area that is cut out. None cuts out the middle, as evaluation does."""
    crop_aspect: tuple[float, float] = setting((3 / 4, 4 / 3), above=0)
    """Random resized crop: width over height."""
    scale_jitter: tuple[float, float] | None = setting(None, above=0)
    """Large-scale jitter, instead of a random crop: the whole image, fitted into the input, is scaled by a factor
    between these, such as 0.1 and 2, and cut or padded to the input at a random place."""
    simple_crop: bool = False
    """Instead of the random resized crop: the shorter side is resized to that of the input, four pixels are mirrored
    around, and a place is drawn. DeiT III's crop for ImageNet-21k."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """The filter by which training resizes, shears and turns: `random` draws one of the two, but resizes by bicubic
    where no crop is drawn. Evaluation is bicubic."""
    random_shift: float = setting(0.0, least=0, most=1)
    """Training images move by up to this fraction of their side in each direction; the edge is repeated."""
    random_flip: float = setting(0.5, least=0, most=1)
    """Probability that a training image is mirrored left to right."""
    auto_augment: Literal["rand", "3a"] = "rand"
    """timm's words for what changes an image after its crop: RandAugment, or in its place 3-Augment (DeiT III): grey,
    solarised or blurred, one of the three."""
    randaugment_ops: int = setting(2, least=0)
    """RandAugment: operations drawn for each image, each applied with probability 0.5; 0 switches it off."""
    randaugment_magnitude: float = setting(9.0, least=0)
    """RandAugment: mean strength, from 0 to 10."""
    randaugment_std: float = setting(0.5, least=0)
    """RandAugment: spread of the strength. The three defaults are timm's `rand-m9-mstd0.5-inc1`."""
    color_jitter: float = setting(0.4, least=0)
    """Brightness, contrast and saturation change by up to this factor. Only where RandAugment is off or 3-Augment is
    in its place, as timm has it."""
    erasing: float = setting(0.25, least=0, most=1)
    """Random erasing: probability that a rectangle of an image becomes noise."""
    mixup: float = setting(0.8, least=0)
    """Mixup: alpha of the beta distribution that two images are blended with; 0 switches it off."""
    cutmix: float = setting(1.0, least=0)
    """Cutmix: alpha of the beta distribution of the area that comes from another image; 0 switches it off."""
    mix_probability: float = setting(1.0, least=0, most=1)
    """Probability that a group of 128 images of a batch is mixed at all."""
    cutmix_switch: float = setting(0.5, least=0, most=1)
    """Probability of cutmix, where mixup is on as well."""
    label_smoothing: float = setting(0.1, least=0, most=1)
    """Probability that the target spreads evenly over all classes."""

    mean: float | tuple[float, ...] = 0.5
    """Subtracted from pixels that are scaled to [0, 1]: one number, or one for each channel."""
    std: float | tuple[float, ...] = setting(0.5, above=0)
    """The divisor after `mean` is subtracted. `python -m tnt_jax.data.statistics` measures both."""
    crop: float = setting(0.9, above=0, most=1)
    """Share of the shorter side that evaluation keeps after resizing: images are resized to size / crop, then cut."""

    num_workers: int = setting(0, role="execution", least=0)
    """Processes that prepare batches, beside the one that trains; 0 prepares them in the latter. The batches do not
    depend on it."""
    num_threads: int = setting(2, role="execution", least=1)
    """Threads that prepare images in every such process. The batches do not depend on it."""
    fast_decode: bool = False
    """Decode JPEGs at a half, a quarter or an eighth of their size where that leaves twice the size of the input. Much
    faster for photographs of many megapixels, but the pixels are not quite those of the published recipe."""
    skip_unreadable: float = setting(0.0, least=0, most=1)
    """Share of the training images that may turn out to be unreadable. Each is logged, and the next image takes its
    place. Evaluation never skips."""

    @classmethod
    def plain(cls, source: str, **fields) -> "DataConfig":
        """Whole images in their ordinary order, unmixed and unchanged but for what `fields` ask for: for small data.
        Labels are smoothed as in the recipe, by 0.1."""
        off = {"repeats": 1, "crop_area": None, "crop": 1.0, "random_flip": 0.0, "randaugment_ops": 0}
        off |= {"color_jitter": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
        return cls(source, **(off | fields))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss; by default that of the task: softmax cross-entropy (single_label), binary cross-entropy of each label
    (multi_label), squared error of standardised targets (regression), cross-entropy of each pixel plus Dice
    (segmentation), that of the head (detection).
    """

    name: LossName | None = None
    """Another loss that the task can have: binary_cross_entropy (BCE) for single_label, as DeiT III (arXiv 2204.07118)
    has it; predictions and evaluations are those of a softmax all the same. pixel_cross_entropy is segmentation's
    without Dice; detection_giou is RetinaNet's with 1 - GIoU of the boxes."""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = setting("none", least=0)
    """Weight of each class, label or target. balanced is inverse to how many training images have it, with a mean of 1
    over the classes of the images: scikit-learn's formula."""
    positive_weights: Literal["none", "balanced"] | tuple[float, ...] = setting("none", least=0)
    """multi_label: weight of each label where an image has it. balanced is how many training images are without it,
    over how many have it; 1 where all have it."""
    focal_gamma: float = setting(0.0, least=0)
    """Focal loss (arXiv 1708.02002): what is predicted well already counts less, by (1 - p) to this power; 0 is
    cross-entropy."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with a linear warm-up and a cosine to the end, and an average of the weights."""

    name: Literal["adamw", "nadamw", "lamb", "lion", "sgd", "muon", "schedule_free"] = "adamw"
    """The optimizer. sgd has momentum, `beta1`; muon moves the matrices and convolutions between the first and the
    last layers, and AdamW the rest; schedule_free is AdamW whose learning rate stays at its peak. docs/training.md has
    what suits each."""
    learning_rate: float = setting(1e-3, above=0)
    """The peak, for the batch size of the run; it is not scaled by it."""
    warmup_epochs: float = setting(5, least=0)
    """Epochs of linear warm-up from `warmup_learning_rate`."""
    cooldown_epochs: int = setting(0, least=0)
    """Epochs at `min_learning_rate` that follow the run's `epochs`."""
    change_every: Literal["step", "epoch"] = "step"
    """When the learning rate changes. The published runs hold it for an epoch."""
    warmup_learning_rate: float = setting(1e-6, least=0)
    """Learning rate of the very first step."""
    min_learning_rate: float = setting(1e-5, least=0)
    """The end of the cosine."""
    weight_decay: float = setting(0.05, least=0)
    """Decoupled weight decay; vectors, biases, positions and the class token are left out, as upstream does. The bias
    between the places of a PyramidTNT decays, as there."""
    layer_decay: float = setting(1.0, above=0, most=1)
    """Learning rate of each block over that of the next one, for fine-tuning; 1 is the same rate for all."""
    clip_norm: float | None = setting(None, above=0)
    """Gradients whose norm over all parameters is above it are scaled down to it. The recipe has None."""
    clip_ratio: float | None = setting(None, above=0)
    """Adaptive clipping (arXiv 2102.06171): the gradient of each output of a layer over its weights is at most this."""
    beta1: float = setting(0.9, least=0, below=1)
    """Decay of the average of gradients."""
    beta2: float = setting(0.999, least=0, below=1)
    """Decay of the average of squared gradients."""
    epsilon: float = setting(1e-8, above=0)
    """Added to the root of the average of squared gradients."""
    ema_decay: float = setting(0.99996, least=0, below=1)
    """Decay of the average of weights, once warmed up."""
    ema_warmup: bool = True
    """At update t the decay is at most (1 + t) / (10 + t): short runs are not held back by their initial weights."""


HAS_NOT = {
    "lion": ("epsilon",),
    "sgd": ("beta2", "epsilon"),
    "schedule_free": ("min_learning_rate", "cooldown_epochs", "ema_decay", "ema_warmup"),
}
"""Fields of `OptimizerConfig` that an optimizer does not have."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher, whose logits for the same augmented images are targets too."""

    teacher: str | None = None
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    alpha: float = setting(0.5, above=0, most=1)
    """Share of the teacher in the loss; the rest is that of the labels."""
    temperature: float = setting(1.0, above=0)
    """The divisor of the logits of both (soft); the loss is multiplied by its square."""
    kind: Literal["soft", "hard"] = "soft"
    """soft is the Kullback-Leibler divergence from the teacher's probabilities, hard cross-entropy with its class."""


@dataclasses.dataclass(frozen=True)
class EarlyStopConfig:
    """When a run ends before its last epoch."""

    patience: int | None = setting(None, role="observation", least=1)
    """Evaluations in a row that are worse than the best, by `best_metric`, after which it ends; None is never."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes that train together. Those of a TPU pod, GKE, SLURM or MPI find each other; elsewhere each is told.

    It is no part of what a run is: the next start may have other processes.
    """

    coordinator: str | None = setting(None, role="execution")
    """HOST:PORT of process 0, as the others reach it. The port must be free there."""
    num_processes: int | None = setting(None, role="execution", least=1)
    """The number of processes."""
    process_id: int | None = setting(None, role="execution", least=0)
    """The number of this process, from 0 on."""
    timeout: float = setting(300, role="execution", above=0)
    """Seconds that all are waited for."""


Model = TypeVar("Model", ModelChanges, ModelConfig)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Generic[Model]):
    """A run. `python train.py --help` lists every field as a flag."""

    run_dir: str = setting("runs/digits", role="execution")
    """The run's folder: configuration, checkpoints, metrics. A run that is started again goes on from there."""
    init_from: str | None = None
    """Model whose parameters the run starts from: a folder, a published name, OWNER/NAME on the hub, an address or a
    checkpoint. Positions are resized to another image size. Classes are matched by name; others get a fresh head."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they begin, by beginnings of their paths: `word_embedding blocks.0-8`, or `all-but-head`.
    Running averages of batch norm go on, as in PyTorch."""
    model: Model = dataclasses.field(default_factory=ModelChanges)
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    batch_size: int = setting(64, least=1)
    """Images of a step over all devices."""
    accumulation_steps: int = setting(1, role="execution", least=1)
    """Parts that a step's batch is computed in, one after the other: less memory, and the same result but where there
    is batch norm, as in a PyramidTNT, or where the loss is one of a batch, as DETR's is: they see a part at a time."""
    fsdp: int = setting(1, role="execution", least=1)
    """Devices that share one copy of parameters and optimizer state; 1 keeps a copy on each."""
    epochs: int = setting(20, least=1)
    """Passes over the training images; the last incomplete batch of each is left out."""
    eval_every_epochs: int = setting(1, role="observation", least=1)
    """Epochs between evaluations; a checkpoint comes before each, and the last step always has both."""
    checkpoint_every_minutes: float = setting(10, role="observation", above=0)
    """Minutes between checkpoints, beside those before evaluations: what a killed run loses at most. They are rarer
    where the steps would wait for them for more than 5% of the time."""
    checkpoint_every_steps: int | None = setting(None, role="observation", least=1)
    """Steps between checkpoints, beside the others."""
    keep_checkpoints: int = setting(2, role="observation", least=1)
    """Latest checkpoints that are kept, beside the best one."""
    best_metric: str | None = setting(None, role="observation")
    """Metric of the averaged weights on the evaluated images that chooses the best checkpoint. By default top1 for
    single_label, map for multi_label, r2 for regression, miou for segmentation and ap for detection; the others are in
    docs/evaluation.md."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    log_every_steps: int = setting(10, role="observation", least=1)
    """Steps between lines of metrics.jsonl and TensorBoard."""
    log_every_seconds: float = setting(60, role="observation", above=0)
    """Seconds between lines that are printed where there is no terminal, beside one after each epoch."""
    precision: Literal["default", "high", "highest"] = "default"
    """The precision of products of float32 matrices on accelerators in training: as the hardware is fastest (TPUs round
    factors to bfloat16, NVIDIA GPUs to TF32), in three passes, or as a CPU does. It makes no difference on CPUs and
    for bfloat16. Evaluation, prediction and export always take highest."""
    seed: int = setting(0, least=0)
    """Of everything random: initial weights, order of the images, augmentation, dropout, stochastic depth."""
    wandb: bool = setting(False, role="observation")
    """Log to Weights & Biases too, in its project tnt_jax."""
    profile: bool = setting(False, role="observation")
    """Write a trace of a few steps, for XProf and TensorBoard, into the run's folder."""
    distributed: DistributedConfig = DistributedConfig()


def check(config: TrainConfig) -> None:
    """Raises InputError for the first field of any part whose value means nothing.

    How the sizes of a model must fit each other, `tnt_jax.models.variants.resolve` checks.
    """
    for fault in faults(config):
        raise InputError(fault)
    if "://" in config.run_dir.removeprefix("gs://"):
        raise InputError(
            f"run_dir is {config.run_dir}, and a run lies on a disk or in one of Google's buckets, gs://BUCKET/FOLDER; "
            "Orbax writes to no other kind of bucket, which can be mounted as a disk"
        )
    if config.profile and config.run_dir.startswith("gs://"):
        raise InputError("profile writes on a disk: leave it out, or take a run_dir there")
    check_data(config.data)
    check_task(config)
    check_optimizer(config.optimizer)
    if config.distill.kind == "hard" and config.distill.temperature != 1:
        raise InputError(
            f"distill.temperature is {config.distill.temperature:g}, which distill.kind hard does not have"
        )
    peak, end = config.optimizer.learning_rate, config.optimizer.min_learning_rate
    if peak < end:
        raise InputError(
            f"optimizer.learning_rate is {peak:g}, and must be at least optimizer.min_learning_rate, {end:g}: the "
            "cosine falls from the one to the other"
        )
    count, index = config.distributed.num_processes, config.distributed.process_id
    if count is not None and index is not None and index >= count:
        raise InputError(f"distributed.process_id is {index}, and must be below distributed.num_processes, {count}")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """`check` for what only some optimizers have."""
    defaults = {field.name: field.default for field in dataclasses.fields(optimizer)}
    for name in HAS_NOT.get(optimizer.name, ()):
        if (value := getattr(optimizer, name)) != defaults[name]:
            raise InputError(
                f"optimizer.{name} is {value!r}, which {optimizer.name} does not have; leave it at {defaults[name]!r}"
            )
    if optimizer.name == "schedule_free" and optimizer.beta1 == 0:
        raise InputError("optimizer.beta1 is 0, and must be above 0 for schedule_free, which averages with it")


def check_data(data: DataConfig) -> None:
    """`check` for the part of a configuration that a data pipeline needs."""
    for fault in faults(data, "data."):
        raise InputError(fault)
    if data.scale_jitter and (data.crop_area or data.simple_crop):
        other = "crop_area must be None" if data.crop_area else "simple_crop must be False"
        raise InputError(f"data.scale_jitter is {data.scale_jitter}, instead of which data.{other}")
    for name in ("crop_area", "crop_aspect", "scale_jitter"):
        low, high = getattr(data, name) or (1, 1)
        if low > high:
            raise InputError(f"data.{name} is {low} to {high}, and must rise")


def check_task(config: TrainConfig) -> None:
    """`check` for what only some tasks have: sampling, weights, the metric of the best checkpoint."""
    task, loss = config.data.task, config.loss
    only = {
        "data.sampling": (config.data.sampling != "natural", "natural"),
        "loss.class_weights": (loss.class_weights == "balanced", "none or numbers"),
        "loss.positive_weights": (loss.positive_weights != "none", "none"),
        "loss.focal_gamma": (loss.focal_gamma > 0, "0"),
        "data.ignore": (config.data.ignore != (), "()"),
        **{f"data.{name}": (getattr(config.data, name) > 0, "0") for name in ("mixup", "cutmix", "label_smoothing")},
    }
    for name, (given, right) in only.items():
        tasks = with_setting(name)
        if given and task not in tasks:
            part, field = name.split(".")
            value = getattr(getattr(config, part), field)
            raise InputError(
                f"{name} is {value!r}, which only {' and '.join(tasks)} can have; for data.task {task} it must be "
                f"{right}"
            )
    if loss.class_weights != "none" and not TASKS[task].weighs_classes:
        raise InputError(f"loss.class_weights is {loss.class_weights!r}, and must be none for data.task {task}")
    if (head := config.model.head or "class") not in TASKS[task].heads:
        right = " or ".join(TASKS[task].heads)
        raise InputError(f"model.head is {head}, and must be {right} for data.task {task}")
    if loss.name not in (None, *(losses := TASKS[task].losses_of(head))):
        of = f"data.task {task}" + (f" with model.head {head}" if losses != TASKS[task].losses else "")
        raise InputError(f"loss.name is {loss.name!r}, and must be {' or '.join(losses)} for {of}")
    metrics = [metric.name for metric in TASKS[task].metrics]
    if config.best_metric not in (None, *metrics):
        raise InputError(
            f"best_metric is {config.best_metric!r}, and must be one of {', '.join(metrics)} for data.task {task}"
        )


def best_metric(config: TrainConfig) -> str:
    """The metric by which the best checkpoint of a run is chosen."""
    return config.best_metric or TASKS[config.data.task].metrics[0].name
