"""The MoWE AudioLLM, in transformers' shape; importing it registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from .configuration_mowe import MoweConfig
from .modeling_mowe import MoweForConditionalGeneration, MoweOutput
from .processing_mowe import MoweProcessor
from .prompt_embeddings import MoweFront, MoweFrontConfig
from .routing import Routing, RoutingRecord
from .routing_loss import RoutingTotals
from .tower import AudioTokens, PreparedAudio

__all__ = [
    "AudioTokens",
    "MoweConfig",
    "MoweForConditionalGeneration",
    "MoweFront",
    "MoweOutput",
    "MoweProcessor",
    "PreparedAudio",
    "Routing",
    "RoutingRecord",
    "RoutingTotals",
]

AutoConfig.register("mowe", MoweConfig)
AutoModel.register(MoweConfig, MoweForConditionalGeneration)
AutoModelForCausalLM.register(MoweConfig, MoweForConditionalGeneration)
AutoModelForMultimodalLM.register(MoweConfig, MoweForConditionalGeneration)
AutoProcessor.register(MoweConfig, MoweProcessor)
AutoConfig.register("mowe_front", MoweFrontConfig)
AutoModel.register(MoweFrontConfig, MoweFront)
AutoProcessor.register(MoweFrontConfig, MoweProcessor)
