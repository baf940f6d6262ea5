from .machine import BRIEF
from .refresh_machine import RefreshMachine

TestRefresh = RefreshMachine.TestCase
TestRefresh.settings = BRIEF
