"""Lists parameters of real models by name. Benchmarks and tests take their shapes from here.

Paths are those of Flax. The default rules keep norms, biases and embeddings in fp32; `bits=8` sets a rule for 8 bits.
"""

from math import prod
from typing import NamedTuple


class Shape(NamedTuple):
    """A parameter of a model."""

    name: str
    shape: tuple[int, ...]
    model: str
    path: str
    bits: int | None = None  # None: the default rules decide

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return prod(self.shape)

    @property
    def rules(self) -> tuple:
        """Returns the `rules` argument that sets `bits`."""
        return () if self.bits is None else ((f"^{self.path}$", self.bits),)

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


SHAPES = {
    s.name: s
    for s in (
        Shape("bert_layernorm", (768,), "BERT base", "encoder/layer_0/LayerNorm/scale"),
        Shape("mobilenet_depthwise", (3, 3, 1, 512), "MobileNet v1", "block_7/depthwise/kernel"),
        Shape("resnet50_stem", (7, 7, 3, 64), "ResNet-50", "conv_init/kernel"),
        Shape("lora_down", (4096, 16), "LLaMA 7B with LoRA of rank 16", "layers_0/attention/wq/lora_a"),
        Shape("lora_up", (16, 4096), "LLaMA 7B with LoRA of rank 16", "layers_0/attention/wq/lora_b"),
        Shape("gpt2_mlp", (768, 3072), "GPT-2", "h_0/mlp/c_fc/kernel"),
        Shape("square_4096", (4096, 4096), "LLaMA 7B, attention", "layers_0/attention/wq/kernel"),
        Shape("gpt2_wte", (50257, 768), "GPT-2, 8 bits by a rule", "wte/embedding", 8),
        Shape("llama_7b_mlp", (4096, 11008), "LLaMA 7B", "layers_0/feed_forward/w1/kernel"),
        Shape("scanned_mlp", (12, 1024, 4096), "GPT-2 medium, 12 scanned layers", "h/mlp/c_fc/kernel"),
    )
}


def tinyllama(layers: int = 22, width: int = 2048) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the 201 parameters of TinyLlama 1.1B (arXiv:2401.02385), by path."""
    inner, keys, vocabulary = 11 * width // 4, width // 8, 125 * width // 8
    kernels = {"wq": (width, width), "wk": (width, keys), "wv": (width, keys), "wo": (width, width)}
    kernels |= {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
    shapes = {"embedding": (vocabulary, width), "norm/scale": (width,), "head/kernel": (width, vocabulary)}
    for k in range(layers):
        shapes |= {f"layer_{k}/{name}/kernel": shape for name, shape in kernels.items()}
        shapes |= {f"layer_{k}/{name}/scale": (width,) for name in ("attention_norm", "mlp_norm")}
    return shapes


def many_small(count: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of vectors of 64 to 4096 elements, in steps of 64."""
    return {f"leaf_{k}": (64 * (1 + k % 64),) for k in range(count)}


DEFAULT = ("bert_layernorm", "resnet50_stem", "gpt2_mlp", "square_4096", "gpt2_wte", "llama_7b_mlp")
QUICK = ("bert_layernorm", "lora_up")
