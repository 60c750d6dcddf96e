"""What a step of training takes on GPUs, on paper: memory and time from shapes and byte counts. Writes docs/scale.md.

    python docs/scale.py                                     (the page)
    python docs/scale.py --measure docs/results/scale/cpu.json (what the formulas are tested on, on this CPU)

Symbols: P parameters, L layers, h hidden size, i intermediate size, V vocabulary, H and K heads of queries and of keys,
d head size, N GPUs, n sequences of T tokens in a micro-batch.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

DOCS = Path(__file__).parent
GIB = 2**30
TILE_TOKENS, TILE_WIDTH = 4096, 32_768  # of TRL's fused head: a tile of logits
CPU_COPIES = 7  # of a tile that the fused head makes where there is no Triton
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv + self.qkv_bias * (self.hidden + 2 * self.kv)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (2 - self.tied) * self.embedding + self.hidden

    @property
    def lora_parameters(self) -> int:
        """Of adapters on every linear layer."""
        sides = 2 * (2 * self.hidden) + 2 * (self.hidden + self.kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * LORA_RANK * sides

    def forward_flop(self, sequences: float, tokens: int) -> float:
        """Two for each weight of a product and token, and the causal attention, which is computed whole."""
        weights = self.layers * (self.layer_parameters - 2 * self.hidden) + self.embedding
        return sequences * tokens * (2 * weights + 4 * self.layers * self.hidden * tokens)


@dataclass(frozen=True)
class GPU:
    name: str
    memory: float  # GiB
    flops: float  # dense bfloat16, a second
    bandwidth: float  # of its memory, bytes a second


# Assumptions, none of them measured here
GPUS = (GPU("H100", 80e9 / GIB, 989e12, 3.35e12), GPU("H200", 141e9 / GIB, 989e12, 4.8e12))
UTILISATION = 0.4  # of the FLOP rate, in training
DECODE = 0.6  # of the memory's bandwidth, in generation
LINKS = {8: 300e9, 64: 40e9}  # bytes a second that a GPU gathers at, in a machine and between machines
RESERVE = 0.92  # of the memory: the rest is CUDA's, NCCL's, and what the allocator cannot use
LIVE, BUCKETS = 1e9, 1e9  # of DeepSpeed: parameters that it keeps gathered, elements of its buckets
MODELS = (
    Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151_936, tied=True, qkv_bias=True),
    Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14_336, 128_256),
    Shape("Llama-3.1-70B", 8192, 80, 64, 8, 28_672, 128_256),
)
METHODS = {  # sequences a step, of prompt and completion tokens, in a micro-batch
    "DPO": {"sequences": 128, "prompt": 0, "completion": 1024, "micro": 4},
    "GRPO": {"sequences": 256, "prompt": 512, "completion": 1536, "micro": 4},
}


def activations(shape: Shape, sequences: int, tokens: int, bytes_: int, checkpointing: bool) -> float:
    """What the forward keeps for the backward.

    A layer keeps two norms (input, normed and output: 6 h), queries and the attention's output (2 H d), keys and values
    (2 K d) and four products of the MLP (4 i), and in float32 three rows of statistics. Checkpointed it keeps its
    input, and one layer at a time is computed again.
    """
    values = 6 * shape.hidden + 2 * shape.heads * shape.head + 2 * shape.kv + 4 * shape.intermediate
    layer = sequences * tokens * (values * bytes_ + 4 * (2 + shape.heads))
    kept = sequences * tokens * shape.hidden * bytes_
    return shape.layers * kept + layer if checkpointing else shape.layers * layer + 3 * kept


def fused_head(shape: Shape, positions: int, bytes_: int, copies: int = 0) -> float:
    """Of the fused LM head, which keeps no logits: a tile of them, float32 gradients of weight and states."""
    rows = min(positions, TILE_TOKENS)
    tile = rows * (TILE_WIDTH * bytes_ + copies * 4 * min(shape.vocabulary, TILE_WIDTH))
    return tile + 4 * shape.embedding + 4 * positions * shape.hidden


def peak_above_start(shape: Shape, sequences: int, tokens: int, checkpointing: bool) -> float:
    """Bytes of a forward and backward in float32 on a CPU: the most is at the head, or at the end of the backward.

    At the end all gradients are there, and the embedding's dense gradient beside the one that it is added to.
    """
    positions = sequences * (tokens - 1)
    middle = activations(shape, sequences, tokens, 4, checkpointing) + fused_head(shape, positions, 4, CPU_COPIES)
    return max(middle, 4 * shape.parameters + 4 * shape.embedding)


def memory(shape: Shape, gpus: int, engine: str, method: str, lora: bool = False) -> dict[str, float]:
    """GiB on each GPU by part: float32 masters, bfloat16 compute, gradient checkpointing."""
    setting = METHODS[method]
    tokens, micro = setting["prompt"] + setting["completion"], min(setting["micro"], setting["sequences"] // gpus)
    trained = shape.lora_parameters if lora else shape.parameters
    frozen = 2 * shape.parameters if lora else 0
    if gpus == 1:
        gathered = 0 if lora else 2 * shape.parameters  # autocast keeps its bfloat16 copies
    elif engine == "FSDP2":  # two layers, a layer's float32 gradients, embeddings and head, the head in float32
        gathered = 8 * shape.layer_parameters + 2 * (2 - shape.tied) * shape.embedding + 4 * shape.embedding
    else:
        gathered = 2 * min(LIVE, shape.parameters) + 2 * BUCKETS + 2 * shape.embedding
    head = fused_head(shape, micro * tokens, 2) - (4 * shape.embedding if lora else 0)
    parts = {
        "weights": (4 * trained + frozen) / gpus,
        "gradients": 4 * trained / gpus,
        "Adam": 8 * trained / gpus,
        "reference": 2 * shape.parameters / gpus if method == "DPO" and not lora else 0,
        "gathered": gathered,
        "activations": activations(shape, micro, tokens, 2, checkpointing=True),
        "head": head,
    }
    return {part: value / GIB for part, value in parts.items()}


def kv_cache(shape: Shape, sequences: float, tokens: int) -> float:
    return 4 * shape.layers * shape.kv * sequences * tokens  # keys and values in bfloat16


def generation(shape: Shape, gpus: int, gpu: GPU) -> tuple[float, float]:
    """Seconds, and GiB on each GPU, of GRPO's completions through vLLM on the GPUs that train.

    An engine lies across as few of them as hold its weights in a quarter of their memory. Its cache has three tenths;
    what does not fit there waits for the next wave.
    """
    setting = METHODS["GRPO"]
    across = min(
        gpus, next(size for size in (1, 2, 4, 8) if 2 * shape.parameters / size <= GIB * gpu.memory / 4 or size == 8)
    )
    tokens, sequences = setting["prompt"] + setting["completion"], setting["sequences"] * across / gpus
    cache = kv_cache(shape, sequences, tokens)
    waves = math.ceil(cache / (0.3 * GIB * gpu.memory * across))
    read = 2 * shape.parameters + cache / waves * (setting["prompt"] + setting["completion"] / 2) / tokens
    compute = 2 * shape.parameters * sequences / waves / (UTILISATION * gpu.flops)
    step = max(read / (DECODE * gpu.bandwidth), compute) / across
    prefill = shape.forward_flop(sequences, setting["prompt"]) / across / (UTILISATION * gpu.flops)
    return prefill + waves * setting["completion"] * step, (2 * shape.parameters + cache / waves) / across / GIB


def seconds(shape: Shape, gpus: int, method: str, gpu: GPU, lora: bool = False) -> float:
    """Of a step: forward, again for the checkpoints, twice that backward, and once the reference or the old policy."""
    setting = METHODS[method]
    tokens, each = setting["prompt"] + setting["completion"], setting["sequences"] // gpus
    compute = (4 if lora else 5) * shape.forward_flop(each, tokens) / (UTILISATION * gpu.flops)
    if gpus > 1:  # two gathers and a scatter of bfloat16 for each micro-batch, under the compute or longer than it
        micro = -(-each // setting["micro"])
        passed = (2 if lora else 3) * 2 * shape.parameters * micro + 2 * shape.parameters
        compute = max(compute, passed * (gpus - 1) / gpus / LINKS[gpus])
    return compute + (generation(shape, gpus, gpu)[0] if method == "GRPO" else 0)


def rows(method: str) -> list[dict[str, Any]]:
    """Every model on every number of GPUs, with the first setting that fits on each GPU."""
    found = []
    for shape in MODELS:
        for gpus in (1, 8, 64):
            row: dict[str, Any] = {"model": shape.name, "GPUs": gpus}
            totals = {
                f"{engine}{', LoRA' * lora}": sum(memory(shape, gpus, engine, method, lora).values())
                for lora in (False, True)
                for engine in ("FSDP2", "ZeRO-3")
            }
            row |= {f"{key} (GiB)": f"{total:.0f}" for key, total in totals.items() if key != "ZeRO-3, LoRA"}
            if method == "GRPO" and gpus > 1:
                del totals["FSDP2, LoRA"]  # with vLLM not tested, and refused
            for gpu in GPUS:
                beside = generation(shape, gpus, gpu)[1] if method == "GRPO" else 0
                if method == "GRPO":
                    row[f"vLLM, {gpu.name} (GiB)"] = f"{beside:.0f}"
                fits = [key for key, total in totals.items() if total + beside <= RESERVE * gpu.memory]
                if not fits and method == "GRPO":
                    fits = [f"{key}, vLLM asleep" for key, total in totals.items() if total <= RESERVE * gpu.memory]
                first = fits[0] if fits else "none"
                took = seconds(shape, gpus, method, gpu, "LoRA" in first)
                first = first.replace("FSDP2", "one process" if gpus == 1 else "FSDP2")
                row[gpu.name] = f"{first}: {took:.1f} s" if fits else first
            found.append(row)
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    table = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in table)


def parts(shape: Shape, gpus: int, engine: str, method: str) -> str:
    return ", ".join(f"{part} {gib:.1f}" for part, gib in memory(shape, gpus, engine, method).items())


def written() -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(DOCS), undefined=jinja2.StrictUndefined)
    template = environment.get_template("scale.md.jinja")
    given = {name: globals()[name] for name in ("MODELS", "METHODS", "GPUS", "UTILISATION", "DECODE", "LINKS")}
    return template.render(**given, rows=rows, markdown=markdown, parts=parts) + "\n"


# What the formulas are tested on

TINY = [("tiny", 8, 256, False), ("tiny", 8, 512, False), ("tiny", 8, 512, True)]
SMOLLM2 = [("smollm2", 2, 128, False), ("smollm2", 4, 256, False), ("smollm2", 4, 256, True)]


def build(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from ceu_rl.models import build_model, build_tokenizer, smollm2_folder

    if name == "tiny":
        model = build_model(build_tokenizer())
    else:
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    add_fused_lm_head(model)
    return model.train()


def shape_of(config: Any) -> Shape:
    heads = config.num_attention_heads, config.num_key_value_heads
    sizes = config.hidden_size, config.num_hidden_layers, *heads, config.intermediate_size, config.vocab_size
    return Shape(config.model_type, *sizes, tied=config.tie_word_embeddings)


def measure(name: str, sequences: int, tokens: int, checkpointing: bool, rounds: int = 3) -> dict[str, Any]:
    """Bytes above the start, FLOP and seconds of the process, of a forward and backward; beside what is computed."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    model = build(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shape = shape_of(model.config)
    ids = torch.randint(0, shape.vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, fused_lm_head=True).loss.backward()

    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        work()
    return {
        **{"model": name, "sequences": sequences, "tokens": tokens, "checkpointing": checkpointing},
        **{"parameters": model.num_parameters(), "peak_bytes": peak, "flop": counter.get_total_flops()},
        "seconds": round(min(times), 3),
    }


def step_flop(shape: Shape, sequences: int, tokens: int, checkpointing: bool) -> float:
    """Forward and twice that backward; the fused head is computed again.

    With checkpointing every layer is too, up to the input of its last product.
    """
    whole, head = shape.forward_flop(sequences, tokens), 2 * shape.embedding * sequences * tokens
    last = 2 * shape.layers * shape.hidden * shape.intermediate * sequences * tokens
    return 4 * whole - last if checkpointing else 3 * whole + head


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", metavar="FILE")
    args = parser.parse_args()
    if args.measure:
        from ceu_rl.run.provenance import environment, write_json

        command = f"OMP_NUM_THREADS=1 python docs/scale.py --measure {args.measure}"
        found = [measure(*row) for row in [*TINY, *SMOLLM2]]
        write_json(
            Path(args.measure), {"command": command, "seed": 0, "dtype": "float32", "rows": found, **environment()}
        )
    else:
        (DOCS / "scale.md").write_text(written())


if __name__ == "__main__":
    main()
