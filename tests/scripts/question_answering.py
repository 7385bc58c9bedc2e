"""The page's example of question answering."""

import torch
from neox_lite import AutoTokenizer, GPTNeoXForQuestionAnswering

tokenizer = AutoTokenizer.from_pretrained("someone/neox-answers")
model = GPTNeoXForQuestionAnswering.from_pretrained("someone/neox-answers")
question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
inputs = tokenizer(question, text, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
answer_start_index = outputs.start_logits.argmax()
answer_end_index = outputs.end_logits.argmax()
predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
print(answer_start_index.item(), answer_end_index.item(), repr(tokenizer.decode(predict_answer_tokens)))
target_start_index, target_end_index = torch.tensor([14]), torch.tensor([15])
outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
print(round(outputs.loss.item(), 2))
