from .machine import BRIEF
from .tree_machine import TreeMachine

TestTree = TreeMachine.TestCase
TestTree.settings = BRIEF
