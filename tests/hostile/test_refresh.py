import pytest

from .machine import BRIEF
from .refresh_machine import RefreshMachine

pytestmark = pytest.mark.filterwarnings("ignore:the tree stays as it is")
TestRefresh = RefreshMachine.TestCase
TestRefresh.settings = BRIEF
