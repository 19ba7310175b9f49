"""The tests that every family passes, by theme; `family_tester.FamilyTester` has them all."""
