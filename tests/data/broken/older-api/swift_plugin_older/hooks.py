raise AssertionError("this module must never be imported")
