from torch import nn
def quantisable(model):
    return [f"{path}.weight" for path, m in model.named_modules() if type(m).__name__ in ("Linear", "LoRALinear") or isinstance(m, nn.Embedding) if not m.weight.requires_grad]
