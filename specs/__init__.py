"""Immutable records of plans, and their laws."""

from .checkpoint import Checkpoint
from .codec import as_plain, dumps, loads
from .distinct_ranks import Distinct
from .equality import ActivationType, CallType, Equality, ModuleTypes, Trust, Unfollowed
from .errors import PlanError, Problem
from .finding import Finding, Silence, Silenced
from .index import Index
from .intervals import Interval
from .memory import Memory, Share
from .mesh import MESH_AXES, Coordinate, Groups, Mesh, MeshAxis
from .microbatch import Microbatch, Saved, SyncCall
from .param import Kind, Origin, ParamSpec
from .pipeline import Activation, ExampleInput, Pipeline, PlainInput, Stage, TensorInput, VariableSize
from .plan import SCHEMA_VERSION, Plan, Runtime
from .plan_diff import Change, PlanDiff
from .program import Constant, InitProgram, Node, Operation
from .proof import Failure, Proof
from .receipt import Collective, Receipt
from .report import Report
from .search import Candidate, Search
from .shard import Shard, Split
from .source import Call, Loaded, Made, Materialised, ModuleCall, ModuleValues, OwnValues, Source, TensorCall, Uninitialised
from .steps import Step
from .stored import Folder, Part, StoredFile, StoredTensor
from .traffic import Boundary, StepTraffic, Traffic
from .tree import SpecTree

__all__ = [
    "MESH_AXES",
    "SCHEMA_VERSION",
    "Activation",
    "ActivationType",
    "Boundary",
    "Call",
    "CallType",
    "Candidate",
    "Change",
    "Checkpoint",
    "Collective",
    "Constant",
    "Coordinate",
    "Distinct",
    "Equality",
    "ExampleInput",
    "Failure",
    "Finding",
    "Folder",
    "Groups",
    "Index",
    "InitProgram",
    "Interval",
    "Kind",
    "Loaded",
    "Made",
    "Materialised",
    "Memory",
    "Mesh",
    "MeshAxis",
    "Microbatch",
    "ModuleCall",
    "ModuleTypes",
    "ModuleValues",
    "Node",
    "Operation",
    "Origin",
    "OwnValues",
    "ParamSpec",
    "Part",
    "Pipeline",
    "PlainInput",
    "Plan",
    "PlanDiff",
    "PlanError",
    "Problem",
    "Proof",
    "Receipt",
    "Report",
    "Runtime",
    "Saved",
    "Search",
    "Shard",
    "Share",
    "Silence",
    "Silenced",
    "Source",
    "SpecTree",
    "Split",
    "Stage",
    "Step",
    "StepTraffic",
    "StoredFile",
    "StoredTensor",
    "SyncCall",
    "TensorCall",
    "TensorInput",
    "Traffic",
    "Trust",
    "Unfollowed",
    "Uninitialised",
    "VariableSize",
    "as_plain",
    "dumps",
    "loads",
]
