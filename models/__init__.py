"""The models: MODELS[model_type] = (config class, model class). Their contract: lib/contract.py."""
from model import GPT, FoldConfig, FoldGPT, GPTConfig

MODELS = {
    'gpt': (GPTConfig, GPT),
    'fold': (FoldConfig, FoldGPT),
}
