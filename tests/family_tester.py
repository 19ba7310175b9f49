"""The tests that every family passes. A family's test class inherits `FamilyTester` and says what to build."""

from family.batches import MODERN, PAD, VOCAB, marks_of, masked_batch, packed_batch
from family.checkpoints import Checkpoints
from family.computing import Computation
from family.cost import Cost
from family.generation import Generation
from family.graphs import Graphs
from family.inputs import Inputs
from family.mixing import Mixing
from family.packing import Packing
from family.parameters import Parameters
from family.state import States
from family.training import Training


class FamilyTester(
    Checkpoints, Parameters, Computation, Mixing, Graphs, Packing, States, Generation, Cost, Training, Inputs
):
    """All of `family`, by theme; what a family says of itself is in `family.base.FamilyBase`."""


__all__ = ["MODERN", "PAD", "VOCAB", "FamilyTester", "marks_of", "masked_batch", "packed_batch"]
