# Made by `make docs` from the cards; not edited by hand.

__version__: str

from regard import bench as bench
from regard import core as core
from regard import errors as errors
from regard import lab as lab
from regard import parts as parts
from regard import reach as reach
from regard import report as report
from regard import see as see
from regard import shape as shape
from regard import shrink as shrink
from regard import steer as steer
from regard import watching as watching
from regard import zoo as zoo
from regard.catalog import methods as methods
from regard.lab import reproduce as reproduce
from regard.lab import trials as trials
from regard.lab.check import check as check
from regard.parts.diffusion.joint import JointMaps as JointMaps
from regard.parts.diffusion.words import WordMaps as WordMaps
from regard.see.cross_attention_explanation.method import Explanation as Explanation
from regard.see.cross_attention_explanation.method import explain as explain
from regard.see.preplan_anchor.coupling import couplings as couplings
from regard.see.preplan_anchor.method import Rhythm as Rhythm
from regard.see.preplan_anchor.method import rhythm as rhythm
from regard.see.refam.method import RefAM as RefAM
from regard.see.sink_emergence.method import Sinks as Sinks
from regard.see.sink_emergence.method import sinks as sinks
from regard.see.stable_semantics.method import ChunkMaps as ChunkMaps
from regard.see.stable_semantics.method import Recipe as Recipe
from regard.shape.mma.method import MMA as MMA
from regard.shape.mma.roles import Roles as Roles
from regard.shape.mma.roles import mma_mask as mma_mask
from regard.shrink.h2o.method import H2O as H2O
from regard.shrink.random_eviction.method import RandomEviction as RandomEviction
from regard.shrink.recycled_attention.method import Recycled as Recycled
from regard.shrink.snapkv.method import SnapKV as SnapKV
from regard.shrink.streaming_llm.method import StreamingLLM as StreamingLLM
from regard.shrink.task_kv.method import TaskKV as TaskKV
from regard.shrink.visiondrop.method import VisionDrop as VisionDrop
from regard.steer.act.heads import HeadFilter as HeadFilter
from regard.steer.act.method import ACT as ACT
from regard.steer.dynamic_prompt_learning.method import (
    DynamicPromptLearning as DynamicPromptLearning,
)
from regard.steer.steer.method import ContrastiveExpertGuidance as ContrastiveExpertGuidance
from regard.steer.structured_diffusion.method import StructuredDiffusion as StructuredDiffusion
from regard.steer.swap_anything.method import SwapAnything as SwapAnything
from regard.steer.swap_anything.method import swap as swap
from regard.steer.swap_anything.objects import swap_object as swap_object
from regard.steer.var.dims import find_sink_dims as find_sink_dims
from regard.steer.var.method import VAR as VAR
from regard.watching import Watch as Watch
from regard.watching import apply as apply
from regard.watching import facts as facts
from regard.watching import watch as watch
from regard.zoo import load as load
from regard.zoo import models as models
