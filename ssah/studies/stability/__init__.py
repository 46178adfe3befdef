"""``ssah stability``: would other prompts have given the same groups?"""
