"""What memory is used for, and when."""

from enum import StrEnum

# Phases of a run, by name.
DEFEND = "defend"
ATTACK = "attack"
HYPERGRADIENT = "hypergradient"


class Part(StrEnum):
    """What a tensor is for; the value is what a report calls it."""

    PARAMETERS = "parameters and buffers"
    GRADIENTS = "gradients"
    DEFENDER_OPTIMIZER = "defender's optimizer"
    ATTACKER_OPTIMIZER = "attacker's optimizer"
    ATTACK_VECTOR = "attack vector"
    SAVED_WEIGHTS = "saved theta"
    TRAJECTORY = "trajectory"
    WEIGHT_TEMPORARIES = "other weight-shaped"
    ACTIVATIONS = "activations"
    GATHERED = "gathered layers"
    FRAMEWORK = "framework"


# Parts with one entry per weight: what sharding divides by the number of devices.
PER_WEIGHT = frozenset(Part) - {Part.ACTIVATIONS, Part.GATHERED, Part.FRAMEWORK}
