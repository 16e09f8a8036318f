"""The models: MODELS[model_type] = (config class, model class). Their contract: lib/contract.py."""
from model import FoldConfig, GPTConfig
from models.cached import GPT, FoldGPT
from models.deltanet import DeltaNet
from models.feedback import Feedback, FeedbackConfig
from models.gated import GatedFold
from models.infini import Infini, InfiniConfig
from models.linear import Linear
from models.lstm import LSTM
from models.peer import PlacelessConfig
from models.queued import QueuedConfig, QueuedFold
from models.rmt import RMT, RMTConfig
from models.transformer_xl import TransformerXL, TransformerXLConfig

MODELS = {
    'gpt': (GPTConfig, GPT),
    'fold': (FoldConfig, FoldGPT),
    'gated_fold': (FoldConfig, GatedFold),
    'queued_fold': (QueuedConfig, QueuedFold),
    'transformer_xl': (TransformerXLConfig, TransformerXL),
    'rmt': (RMTConfig, RMT),
    'infini': (InfiniConfig, Infini),
    'linear': (PlacelessConfig, Linear),
    'deltanet': (PlacelessConfig, DeltaNet),
    'feedback': (FeedbackConfig, Feedback),
    'lstm': (PlacelessConfig, LSTM),
}
