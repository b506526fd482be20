"""The typed tree of configuration keys. Each part receives its own section, never the tree.

Parameters of a table row (a loss, a correction, a task) are the keywords of its function, written beside ``name``;
options of vLLM and DeepSpeed pass through ``rollout.vllm`` and ``train.deepspeed`` as they are. Neither is mirrored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen part of the tree. Unknown keys are refused (``load`` names the nearest one)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the sentence under a key is its description, quoted by error messages
    )


class Row(BaseModel):
    """A row of a table, by name, with its function's keywords beside it: ``{name: ppo_clip, eps_high: 0.28}``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Name of the run; its folder is ``<root>/<name>``."""
    root: Path = Path("runs")
    """Folder of all runs. Made absolute."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Seed of everything random: order of questions, sampling, initialisation."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Number of batches to train."""


class ModelSection(Section):
    path: str = "tiny"
    """A Hugging Face folder of a causal LM with tokenizer, or ``tiny``: the embedded model, made and cached at first
    use."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the rollout engines; that of the learner is train.dtype."""


class DataSection(Section):
    train_path: Path | None = None
    """Training questions: a JSONL, parquet or Arrow file, or a folder (of ``save_to_disk``, or of such files)."""
    eval_path: Path | None = None
    """Held-out questions, likewise; without them they are split off the training questions."""
    task: Row | None = None
    """A generated task instead of files: ``{name: reversed_sum}`` or ``{name: reasoning_gym.<dataset>, ...}``."""
    prompt_key: str = "prompt"
    """Column of the question: text, or a list of chat messages."""
    answer_key: str = "answer"
    """Column of the reference answer."""
    eval_questions: Annotated[int, Field(ge=1)] = 500
    """How many questions are held out."""
    max_requeues: Annotated[int, Field(ge=0)] = 3
    """How often a draw lost to a fault or to staleness is asked again before it is given up."""


class RewardSection(Section):
    path: str | None = None
    """``package.module:function`` or ``file.py:function``; null: the task's own scorer, or exact match for files."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Deadline of one reward call, seconds."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Number of reward worker processes."""
    max_drops_in_a_row: Annotated[int, Field(ge=1)] = 64
    """So many rollouts dropped one after another by the reward function stop the run."""
    correct_at: float = 1.0
    """Reward from which an answer counts as correct (accuracy and pass@k)."""


Preset = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "ppo",
    "vapo",
    "gspo",
    "gmpo",
    "cispo",
    "topr",
    "sapo",
    "areal",
    "llamarl",
    "icepop",
    "c3po",
    "m2po",
    "opo",
    "lite_ppo",
    "gpg",
]


class AlgoSection(Section):
    preset: Preset = "grpo"
    """Named settings of the keys below; a key given explicitly wins."""
    advantage: Row | None = None
    """Row of ADVANTAGES."""
    loss: Row | None = None
    """Row of POLICY_LOSSES."""
    correction: Row | None = None
    """Row of CORRECTIONS: the off-policy weight; ``{name: none}`` switches it off."""
    rejections: tuple[Row, ...] | None = None
    """Further rows of CORRECTIONS, that take tokens or sequences out, e.g. ``[{name: veto}]``."""
    anchor: Literal["proximal", "behaviour"] | None = None
    """Centre of the loss's trust region: the learner before the batch, or the engine that sampled."""
    aggregation: Row | None = None
    """Row of AGGREGATIONS: how the losses of tokens become one number."""
    shaping: tuple[Row, ...] | None = None
    """Rows of SHAPINGS, applied to the rewards of a group in this order, e.g. ``[{name: overlong_penalty}]``."""
    selection: tuple[Row, ...] | None = None
    """Rows of SELECTIONS: which rollouts of a group are trained; a group left empty is replaced by another question."""
    kl: Row | None = None
    """Row of KL_ESTIMATORS: divergence from a reference policy; null: no reference."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.001
    """Its weight in the first step."""
    kl_control: Row = Row(name="fixed")
    """Row of COEFFICIENTS: how that weight moves."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence goes. ``reward`` needs advantages by tokens (reinforce_pp, remax, gae)."""
    reference_every_steps: Annotated[int, Field(ge=0)] = 0
    """The reference becomes a copy of the policy every so many steps; 0: it stays the model of the start."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus in the first step."""
    entropy_control: Row = Row(name="fixed")
    """Row of COEFFICIENTS: how that weight moves."""
    allow_uncorrected: bool = False
    """Train stale data without a correction all the same."""


def _replicas(value: Any) -> Any:
    """One message, where a union of types would give one for each."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("replicas", "Input should be a whole number from 1 on, or auto")


class RolloutSection(Section):
    replicas: Annotated[int | Literal["auto"], PlainValidator(_replicas)] = 1
    """Number of vLLM engines, lost ones replaced where there is room; or ``auto``: as many as the cluster holds beside
    the learner, now and whenever machines join or leave."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """eta: how many steps old a trained token may be; 0 is synchronous and on-policy."""
    update_mode: Literal["recompute", "keep", "drain"] = "recompute"
    """How requests in flight go on under new weights: recompute computes their KV again, keep leaves it old (their
    tokens then match neither policy), drain lets them end first, while new ones wait."""
    update_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the replicas, at least one, that take over new weights at a time; the others generate on."""
    weight_channel: Literal["auto", "shm", "tcp", "nccl", "ipc", "sharded_rdt"] = "auto"
    """How new weights come to the engines: shm, memory shared with the learner; tcp, a copy on their machine; auto is
    shm on the learner's machine and tcp elsewhere. nccl, ipc: vLLM's own, between GPUs, from a process beside the
    learner or the engine that reads the published version. vLLM's sharded_rdt is refused: it takes engines of another
    kind."""
    age_policy: Literal["drop", "mask", "pace"] = "drop"
    """What happens to tokens older than eta. drop: the whole rollout leaves, and is stopped as soon as that is certain;
    mask: they carry no weight; pace: they are trained, and counted as staleness/violations."""
    oversample: Annotated[float, Field(ge=0)] = 0.0
    """So much of a batch more is under way than eta allows, e.g. 0.25: a batch then need not wait for its slowest
    answers. What is too old for a batch in the end leaves by age_policy, and is asked again."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Rollouts per question."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Most tokens sampled per answer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature in training; the learner divides its logits by the same number."""
    slots: Annotated[int, Field(ge=1)] = 256
    """Most rollouts at once on one engine. Up to 16 more wait inside it, unless update_mode is drain."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray reserves for one engine, all of its processes together."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one engine, all of its processes together."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Deadline for an engine to come up, seconds."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Deadline for one group, or one weight swap, on an engine, seconds."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, passed through."""

    @property
    def num_replicas(self) -> int | None:
        """None: ``auto``."""
        return None if self.replicas == "auto" else self.replicas


class TrainSection(Section):
    ranks: Annotated[int, Field(ge=1)] = 1
    """Data-parallel learner ranks: each trains its share of a batch."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes that share the layers of each rank's model (DeepSpeed's AutoTP); there are ranks times as many."""
    expert_parallel: Annotated[int, Field(ge=1)] = 1
    """Data-parallel ranks in a row that share the experts of a mixture of experts (DeepSpeed's AutoEP): each has some,
    and tokens travel. Divides train.ranks and the number of experts."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes that share the rows of each rank's microbatches (DeepSpeed's Ulysses): each has a piece of every row,
    and within attention some heads; there are ranks times as many."""
    router_aux_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that balances the load of experts, over all tokens of an optimizer step; 0 switches it off,
    whatever the model's own config says of its training before. It costs a forward pass more."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    prompts_per_batch: Annotated[int, Field(ge=1)] = 16
    """Questions per trained batch (times rollout.group_size: rollouts). Under a token budget: how many may be
    unfinished (sampled_tokens), for each batch of lead (trained_tokens)."""
    batch_by: Literal["prompts", "trained_tokens", "sampled_tokens"] = "prompts"
    """What makes a batch: so many questions; or a budget of tokens, train.tokens_per_batch: the oldest finished groups
    that fill it (trained_tokens, C3PO), or all that is finished once the engines have sampled it (sampled_tokens,
    C3PO++: what is unfinished goes on under the next weights)."""
    tokens_per_batch: Annotated[int, Field(ge=1)] | None = None
    """That budget, sampled tokens; null where train.batch_by is prompts."""
    steps_per_batch: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per batch, on disjoint parts of it. At 1 the clip of a clipped loss never acts: presets whose
    point is a clip set 2 where the key is left out."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 4096
    """Token budget of one forward and backward pass."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute the rest again in the backward pass: less memory, a third more
    work."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear learning-rate warm-up."""
    schedule: Row = Row(name="constant")
    """Row of SCHEDULES: how the learning rate goes after the warm-up, up to the last of run.steps: constant, linear,
    cosine, wsd, e.g. ``{name: cosine, floor: 0.1}``."""
    rewarm_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a linear warm-up after each resume; 0: a resumed run goes on as if it had never stopped."""
    optimizer: Row = Row(name="adamw")
    """Row of OPTIMIZERS: adamw, adam, sgd, adagrad, lion, muon, e.g. ``{name: sgd, momentum: 0.9}``."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; decoupled in adamw, lion and muon."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments of adamw, adam, lion and muon's part that is Adam."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights, forward and backward pass in training. Master weights and moments are float32 always."""
    float32_head: bool = False
    """Compute logits and log-probabilities in float32 where the rest of the model is in bfloat16."""
    offload: Literal["none", "optimizer", "optimizer+params"] = "none"
    """What waits in the machine's memory (ZeRO-Offload): the optimizer's state, whose steps the CPU then takes (ZeRO
    stage 1 to 3); and the weights that are not in use (stage 3)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping; 0 switches it off."""
    cpus_per_rank: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray reserves for one learner process."""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one learner process."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Deadline for the learner to come up, seconds."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Deadline for one training step or export, seconds."""
    lora: dict[str, Any] | None = None
    """Keywords of peft's LoraConfig, passed through, e.g. ``{r: 16, lora_alpha: 32}``: only low-rank adapters of the
    linear layers are trained. Engines get them alone where vLLM serves such adapters, else merged; checkpoints leave
    the base out. null: every weight is trained."""
    frozen: tuple[str, ...] = ()
    """Patterns of names of parameters that are not trained, e.g. ``[model.embed_tokens*, model.layers.0.*]``."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed config entries, passed through."""

    @property
    def processes(self) -> int:
        return self.ranks * self.tensor_parallel * self.sequence_parallel


class CriticSection(Section):
    """The value model. There is one where ``algo.advantage`` asks for it (gae), and only then."""

    path: str | None = None
    """Folder of the model it starts from; null: model.path."""
    loss: Row = Row(name="clipped_squared_error")
    """Row of VALUE_LOSSES."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """So many batches train the critic alone, before the policy learns from it."""


class TeacherSection(Section):
    """On-policy distillation: another model scores the rollouts' tokens."""

    path: str | None = None
    """Folder of the teacher, a causal LM with the same tokenizer; null: no teacher."""
    top_k: Annotated[int, Field(ge=0, le=128)] = 0
    """0: reverse KL estimated on the sampled tokens; else reverse KL over this many likeliest tokens of the teacher."""
    coef: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the divergence."""
    with_reward: bool = False
    """Learn from the reward as well; false: from the teacher alone."""
    slots: Annotated[int, Field(ge=1)] = 64
    """Most rollouts at once on the teacher's engine."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray reserves for it."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for it."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, passed through."""


class EvalSection(Section):
    every_steps: Annotated[int, Field(ge=0)] = 10
    """Held-out evaluation every so many steps, beside the training; 0: only before and after."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Samples per question for pass@k before and after; 0 switches it off."""
    pass_at: tuple[int, ...] = (1, 4)
    """The k of pass@k; each at most ``samples``."""


class CheckpointSection(Section):
    every_steps: Annotated[int, Field(ge=0)] = 10
    """A checkpoint every so many steps, beside those after the last step and at a stop; 0: only those."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints are kept, the newest ones."""


class ObserveSection(Section):
    tensorboard: bool = True
    """Write TensorBoard event files."""
    rollouts_per_step: Annotated[int, Field(ge=0)] = 4
    """Sampled rollouts written per step to ``rollouts/``."""


class RaySection(Section):
    address: str | None = None
    """HOST:PORT of the cluster to join; null means RAY_ADDRESS, or else a cluster started for this run."""
    dashboard: bool = True
    """Start the dashboard with a cluster started for this run."""


class Config(Section):
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    algo: AlgoSection = AlgoSection()
    rollout: RolloutSection = RolloutSection()
    train: TrainSection = TrainSection()
    critic: CriticSection = CriticSection()
    teacher: TeacherSection = TeacherSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    observe: ObserveSection = ObserveSection()
    ray: RaySection = RaySection()

    @property
    def rollouts_per_batch(self) -> int:
        return self.train.prompts_per_batch * self.rollout.group_size
