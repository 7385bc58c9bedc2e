"""transformers' streamers: to the screen, and in a thread."""

from threading import Thread

from neox_lite import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer

tok = AutoTokenizer.from_pretrained("EleutherAI/gpt-neox-20b")
model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b")
inputs = tok(["An increasing sequence: one,"], return_tensors="pt")
_ = model.generate(**inputs, streamer=TextStreamer(tok), max_new_tokens=10, do_sample=False)

streamer = TextIteratorStreamer(tok, skip_prompt=True, skip_special_tokens=True)
thread = Thread(target=model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=10, do_sample=False))
thread.start()
print("".join(streamer))
thread.join()
