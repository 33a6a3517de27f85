# SPDX-License-Identifier: Apache-2.0
"""Labelled images of any task: batches, picture files and folders, drawings."""
