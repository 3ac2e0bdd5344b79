"""What is planned: immutable records and their own laws. No torch, no effects."""

from .codec import dumps, loads
from .errors import PlanError, Problem
from .mesh import MESH_AXES, Coordinate, Groups, Mesh, MeshAxis
from .param import Index, Kind, Origin, ParamSpec
from .pipeline import Activation, ExampleInput, Pipeline, PlainInput, Stage, TensorInput, VariableSize
from .plan import SCHEMA_VERSION, Plan, Runtime
from .program import Constant, InitProgram, Node, Operation
from .receipt import Collective, Receipt
from .report import Finding, Report
from .shard import Interval, Shard, Split
from .source import Call, Made, ModuleCall, ModuleValues, OwnValues, Source, TensorCall, Uninitialised
from .steps import Step
from .tree import SpecTree

__all__ = [
    "MESH_AXES",
    "SCHEMA_VERSION",
    "Activation",
    "Call",
    "Collective",
    "Constant",
    "Coordinate",
    "ExampleInput",
    "Finding",
    "Groups",
    "Index",
    "InitProgram",
    "Interval",
    "Kind",
    "Made",
    "Mesh",
    "MeshAxis",
    "ModuleCall",
    "ModuleValues",
    "Node",
    "Operation",
    "Origin",
    "OwnValues",
    "ParamSpec",
    "Pipeline",
    "PlainInput",
    "Plan",
    "PlanError",
    "Problem",
    "Receipt",
    "Report",
    "Runtime",
    "Shard",
    "Source",
    "SpecTree",
    "Split",
    "Stage",
    "Step",
    "TensorCall",
    "TensorInput",
    "Uninitialised",
    "VariableSize",
    "dumps",
    "loads",
]
