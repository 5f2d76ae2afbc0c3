"""Parameters of real models, by name: the one list that benchmarks and tests take their shapes from.

Paths are Flax's. Default rules keep norms, biases and embeddings in fp32; `bits=8` asks for bytes by a rule.
"""

from math import prod
from typing import NamedTuple


class Shape(NamedTuple):
    """A parameter, and the model that has it."""

    name: str
    shape: tuple[int, ...]
    model: str
    path: str
    bits: int | None = None  # None leaves it to the default rules

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def rules(self) -> tuple:
        """The `rules` argument that gives `bits`."""
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
DEFAULT = ("bert_layernorm", "resnet50_stem", "gpt2_mlp", "square_4096", "gpt2_wte", "llama_7b_mlp")
QUICK = ("bert_layernorm", "lora_up")
