"""The page's example of token classification, and its pipeline."""

import torch
from neox_lite import AutoTokenizer, GPTNeoXForTokenClassification, pipeline

tokenizer = AutoTokenizer.from_pretrained("someone/neox-tagger")
model = GPTNeoXForTokenClassification.from_pretrained("someone/neox-tagger")
inputs = tokenizer(
    "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
predicted_token_class_ids = logits.argmax(-1)
predicted_tokens_classes = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]
print(predicted_tokens_classes[:6])
loss = model(**inputs, labels=predicted_token_class_ids).loss
print(round(loss.item(), 2))

tagger = pipeline("token-classification", model=model, tokenizer=tokenizer)
print([(found["word"], found["entity"]) for found in tagger("Paris")])
