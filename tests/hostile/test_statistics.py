from .machine import BRIEF
from .statistics_machine import StatisticsMachine

TestStatistics = StatisticsMachine.TestCase
TestStatistics.settings = BRIEF
