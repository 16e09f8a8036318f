"""The models: MODELS[model_type] = (config class, model class). Their contract: lib/contract.py."""
from model import GPT, FoldConfig, FoldGPT, GPTConfig
from models.ablations import DroppedFold, FrozenFold

MODELS = {
    'gpt': (GPTConfig, GPT),
    'fold': (FoldConfig, FoldGPT),
    'fold_dropped': (FoldConfig, DroppedFold),
    'fold_frozen': (FoldConfig, FrozenFold),
}
