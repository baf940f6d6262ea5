from .machine import BRIEF
from .training_machine import TrainingMachine

TestTraining = TrainingMachine.TestCase
TestTraining.settings = BRIEF
