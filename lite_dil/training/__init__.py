"""Passes, optimiser steps, the reference cache and metrics."""
